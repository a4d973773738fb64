package dev.tandem.model;

import java.io.IOException;
import java.lang.foreign.MemorySegment;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;

/**
 * Takes the bytes of one tensor on their way into a file. Not for use after the {@link SafetensorsWriter.Source} that
 * was given it has returned.
 */
public final class TensorSink {
    /** A ByteBuffer cannot span more than 2 GiB; the kernel copies in pieces anyway. */
    private static final long PIECE = 64 << 20;

    private final FileChannel channel;
    private final String tensor;
    private long remaining;

    TensorSink(FileChannel channel, String tensor, long bytes) {
        this.channel = channel;
        this.tensor = tensor;
        this.remaining = bytes;
    }

    /**
     * Appends bytes.
     *
     * @param bytes the next elements in row-major, little-endian order
     * @throws IOException when the disk does not take them
     * @throws IllegalArgumentException when the tensor would become longer than its shape says
     */
    public void write(MemorySegment bytes) throws IOException {
        if (bytes.byteSize() > remaining) {
            throw new IllegalArgumentException("Writing tensor " + tensor + ": " + bytes.byteSize()
                    + " bytes given where "
                    + remaining + " were left to write");
        }
        for (long offset = 0; offset < bytes.byteSize(); offset += PIECE) {
            ByteBuffer piece = bytes.asSlice(offset, Math.min(PIECE, bytes.byteSize() - offset)).asByteBuffer();
            while (piece.hasRemaining()) {
                channel.write(piece);
            }
        }
        remaining -= bytes.byteSize();
    }

    void finish() {
        if (remaining != 0) {
            throw new IllegalArgumentException("Writing tensor " + tensor + ": its source ended " + remaining
                    + " bytes early");
        }
    }
}
