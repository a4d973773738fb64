package dev.tandem.model;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonPrimitive;
import dev.tandem.device.DType;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.nio.ByteOrder;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.stream.Collectors;

/**
 * The header of a safetensors file: eight bytes of length, then JSON that gives each tensor's dtype, shape and byte
 * range.
 *
 * <p>The file may come from anywhere, so the header is believed only as far as it can be checked. The length must fit
 * the file (and the 100 MB that the reference implementation allows) before anything is allocated for it; a range
 * must lie in the file, have exactly the size that shape and dtype give, and all ranges together must cover the data
 * once, without holes or overlap. A hole could carry anything; an overlap would make two parameters one.
 */
final class SafetensorsHeader {
    private static final ValueLayout.OfLong LENGTH =
            ValueLayout.JAVA_LONG_UNALIGNED.withOrder(ByteOrder.LITTLE_ENDIAN);
    private static final long LONGEST = 100_000_000;
    private static final Set<String> FIELDS = Set.of("dtype", "shape", "data_offsets");

    private SafetensorsHeader() {}

    /** Where a tensor lies, counted from the end of the header. */
    @SuppressWarnings("ArrayRecordComponent")
    private record Range(String name, DType dtype, long[] shape, long begin, long end) {}

    static List<TensorEntry> read(Path file, MemorySegment bytes) {
        if (bytes.byteSize() < 8) {
            throw new ModelFormatException(file + ": expected at least the 8 bytes of a header length, found "
                    + bytes.byteSize()
                    + " bytes");
        }
        long length = bytes.get(LENGTH, 0);
        long rest = bytes.byteSize() - 8;
        if (length < 2 || length > LONGEST || length > rest) {
            throw new ModelFormatException(file + ": the header's length is " + Long.toUnsignedString(length)
                    + " bytes, expected from 2 to "
                    + Math.min(rest, LONGEST) + " (the file has " + bytes.byteSize() + ")");
        }
        if (bytes.get(ValueLayout.JAVA_BYTE, 8) != '{') {
            throw new ModelFormatException(file + ": expected the header to start with {, found byte "
                    + (bytes.get(ValueLayout.JAVA_BYTE, 8) & 0xff));
        }
        String source = file + ": header";
        String text = StrictJson.decode(source, bytes.asSlice(8, length).asByteBuffer());
        JsonFields header = JsonFields.of(source, StrictJson.parse(source, text));
        MemorySegment data = bytes.asSlice(8 + length);
        List<Range> ranges = new ArrayList<>();
        for (Map.Entry<String, JsonElement> entry : header.object().entrySet()) {
            if (entry.getKey().equals("__metadata__")) {
                checkMetadata(header);
            } else {
                ranges.add(range(file, entry.getKey(), entry.getValue(), data.byteSize()));
            }
        }
        checkCover(file, ranges, data.byteSize());
        return ranges.stream()
                .map(r -> new TensorEntry(r.name, r.dtype, r.shape, data.asSlice(r.begin, r.end - r.begin)))
                .toList();
    }

    private static void checkMetadata(JsonFields header) {
        JsonFields metadata = header.fields("__metadata__");
        if (metadata != null) {
            metadata.object().keySet().forEach(metadata::text);
        }
    }

    private static Range range(Path file, String name, JsonElement description, long available) {
        JsonFields fields = JsonFields.of(file + ": tensor " + StrictJson.brief(name), description);
        for (String field : fields.object().keySet()) {
            if (!FIELDS.contains(field)) {
                throw fields.wrong(field, "only dtype, shape and data_offsets");
            }
        }
        DType dtype = dtype(fields);
        long[] shape = numbers(fields, "shape");
        long[] offsets = numbers(fields, "data_offsets");
        if (offsets.length != 2) {
            throw fields.wrong("data_offsets", "two numbers");
        }
        if (offsets[0] > offsets[1] || offsets[1] > available) {
            throw new ModelFormatException(fields.source() + ": data_offsets " + Arrays.toString(offsets)
                    + " do not lie in order within the file's " + available + " bytes of data");
        }
        long size = size(fields, shape, dtype);
        if (offsets[1] - offsets[0] != size) {
            throw new ModelFormatException(fields.source() + ": shape " + Arrays.toString(shape) + " of "
                    + dtype.safetensorsName()
                    + " needs " + size + " bytes, data_offsets span " + (offsets[1] - offsets[0]));
        }
        return new Range(name, dtype, shape, offsets[0], offsets[1]);
    }

    private static DType dtype(JsonFields fields) {
        String found = fields.text("dtype");
        for (DType dtype : DType.values()) {
            if (dtype.safetensorsName().equals(found)) {
                return dtype;
            }
        }
        throw fields.wrong("dtype", "one of "
                + Arrays.stream(DType.values()).map(DType::safetensorsName).collect(Collectors.joining(", ")));
    }

    private static long[] numbers(JsonFields fields, String name) {
        JsonArray array = fields.list(name);
        if (array == null) {
            throw fields.wrong(name, "a list of numbers");
        }
        long[] values = new long[array.size()];
        for (int i = 0; i < values.length; i++) {
            values[i] = array.get(i) instanceof JsonPrimitive primitive && primitive.isNumber()
                    ? JsonFields.wholeNumber(primitive.getAsString()) : -1;
            if (values[i] < 0) {
                throw new ModelFormatException(fields.source() + ": field \"" + name
                        + "\": expected whole numbers from 0 to 10^18, found "
                        + StrictJson.brief(array.get(i)));
            }
        }
        return values;
    }

    private static long size(JsonFields fields, long[] shape, DType dtype) {
        try {
            long size = dtype.bytes();
            for (long dimension : shape) {
                size = Math.multiplyExact(size, dimension);
            }
            return size;
        } catch (ArithmeticException e) {
            throw new ModelFormatException(fields.source() + ": shape " + StrictJson.brief(Arrays.toString(shape))
                    + " has more bytes than a 64-bit number can count", e);
        }
    }

    private static void checkCover(Path file, List<Range> ranges, long available) {
        List<Range> ordered = new ArrayList<>(ranges);
        ordered.sort(Comparator.comparingLong(Range::begin).thenComparingLong(Range::end));
        long position = 0;
        for (Range range : ordered) {
            if (range.begin != position) {
                throw new ModelFormatException(file + ": tensor " + StrictJson.brief(range.name) + " begins at byte "
                        + range.begin
                        + (range.begin < position ? " and overlaps the tensor before it, which ends at "
                                : ", which leaves a hole after byte ") + position);
            }
            position = range.end;
        }
        if (position != available) {
            throw new ModelFormatException(file + ": the tensors take " + position + " bytes, the file has " + available
                    + " bytes of data; it is truncated or carries something else");
        }
    }
}
