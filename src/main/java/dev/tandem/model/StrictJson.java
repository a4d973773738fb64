package dev.tandem.model;

import com.google.gson.GsonBuilder;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonPrimitive;
import com.google.gson.Strictness;
import com.google.gson.ToNumberPolicy;
import com.google.gson.stream.JsonReader;
import com.google.gson.stream.JsonToken;
import com.google.gson.stream.MalformedJsonException;
import java.io.IOException;
import java.io.StringReader;
import java.nio.ByteBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;

/**
 * JSON as RFC 8259 has it and no more. A JSON library's defaults are made to be forgiving: comments, NaN, bare words,
 * the last of two equal names, any nesting until the stack ends. In a file that says which bytes are which weights,
 * each of these is a way to read something other than what the writer meant, so each is an error that names the file.
 */
final class StrictJson {
    private static final int DEEPEST = 64;
    private static final long LARGEST_FILE = 64 << 20;

    private StrictJson() {}

    /** Reads a file of at most 64 MiB. */
    static JsonElement read(Path file) {
        return parse(file.toString(), readText(file, LARGEST_FILE));
    }

    static String readText(Path file, long largest) {
        try {
            long size = Files.size(file);
            if (size > largest) {
                throw new ModelFormatException(file + ": expected at most " + largest + " bytes, found " + size);
            }
            return decode(file.toString(), ByteBuffer.wrap(Files.readAllBytes(file)));
        } catch (NoSuchFileException e) {
            throw new ModelFormatException(file + ": there is no such file", e);
        } catch (IOException e) {
            throw new ModelFormatException(file + ": cannot be read: " + e, e);
        }
    }

    static String decode(String source, ByteBuffer bytes) {
        try {
            return StandardCharsets.UTF_8.newDecoder().decode(bytes).toString();
        } catch (CharacterCodingException e) {
            throw new ModelFormatException(source + ": expected UTF-8 text, found other bytes", e);
        }
    }

    static JsonElement parse(String source, String text) {
        try {
            JsonReader reader = reader(text);
            JsonElement value = value(source, reader);
            if (reader.peek() != JsonToken.END_DOCUMENT) {
                throw new ModelFormatException(source + ": expected one JSON value, found more after it");
            }
            return value;
        } catch (IOException | IllegalStateException e) {
            throw malformed(source, e);
        }
    }

    static JsonReader reader(String text) {
        JsonReader reader = new JsonReader(new StringReader(text));
        reader.setStrictness(Strictness.STRICT);
        reader.setNestingLimit(DEEPEST);
        return reader;
    }

    static ModelFormatException malformed(String source, Exception e) {
        String reason = e instanceof MalformedJsonException || e instanceof IOException
                ? String.valueOf(e.getMessage()) : e.toString();
        return new ModelFormatException(source + ": malformed JSON: " + reason.lines().findFirst().orElse(""), e);
    }

    private static JsonElement value(String source, JsonReader reader) throws IOException {
        return switch (reader.peek()) {
            case BEGIN_OBJECT -> {
                JsonObject object = new JsonObject();
                reader.beginObject();
                while (reader.hasNext()) {
                    String name = reader.nextName();
                    if (object.has(name)) {
                        throw new ModelFormatException(source + ": malformed JSON: the name \"" + brief(name)
                                + "\" stands twice in one object");
                    }
                    object.add(name, value(source, reader));
                }
                reader.endObject();
                yield object;
            }
            case BEGIN_ARRAY -> {
                JsonArray array = new JsonArray();
                reader.beginArray();
                while (reader.hasNext()) {
                    array.add(value(source, reader));
                }
                reader.endArray();
                yield array;
            }
            case STRING -> new JsonPrimitive(reader.nextString());
            // Kept as it is written: what range it must have is the reader's business, and BigDecimal("1e999999999")
            // is a trap.
            case NUMBER -> new JsonPrimitive(ToNumberPolicy.LAZILY_PARSED_NUMBER.readNumber(reader));
            case BOOLEAN -> new JsonPrimitive(reader.nextBoolean());
            case NULL -> {
                reader.nextNull();
                yield JsonNull.INSTANCE;
            }
            case END_ARRAY, END_OBJECT, NAME, END_DOCUMENT ->
                throw new ModelFormatException(source + ": malformed JSON: expected a value, found " + reader.peek());
        };
    }

    /** {@return the text in full, or its beginning where it is long; for messages} */
    static String brief(String text) {
        return text.length() <= 120 ? text : text.substring(0, 120) + "…";
    }

    static String brief(JsonElement element) {
        if (element.isJsonObject()) {
            return "an object";
        }
        return element.isJsonArray() ? "a list" : brief(element.toString());
    }

    static String print(JsonElement element) {
        return new GsonBuilder().setPrettyPrinting().disableHtmlEscaping().serializeNulls().create().toJson(element)
                + "\n";
    }
}
