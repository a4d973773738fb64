package dev.tandem.model;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.AtomicMoveNotSupportedException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;

/**
 * Files that are either wholly there or not at all: written beside their place, flushed to disk, then renamed into
 * it.
 */
final class AtomicFile {
    /** Writes a file's bytes. */
    interface Body {
        void write(FileChannel channel) throws IOException;
    }

    private AtomicFile() {}

    static void write(Path file, String text) {
        write(file, channel -> {
            ByteBuffer bytes = ByteBuffer.wrap(text.getBytes(StandardCharsets.UTF_8));
            while (bytes.hasRemaining()) {
                channel.write(bytes);
            }
        });
    }

    static void write(Path file, Body body) {
        Path temporary = prepare(file, body);
        publish(temporary, file);
    }

    /** Writes beside {@code file} and leaves it there for {@link #publish}. */
    static Path prepare(Path file, Body body) {
        Path temporary = file.resolveSibling("." + file.getFileName() + "." + ProcessHandle.current().pid() + ".tmp");
        try {
            try (FileChannel channel = FileChannel.open(temporary, StandardOpenOption.CREATE, StandardOpenOption.WRITE,
                    StandardOpenOption.TRUNCATE_EXISTING)) {
                body.write(channel);
                channel.force(true);
            }
            return temporary;
        } catch (IOException e) {
            discard(temporary);
            throw new ModelFormatException(file + ": cannot be written: " + e, e);
        } catch (RuntimeException | Error e) {
            discard(temporary);
            throw e;
        }
    }

    static void publish(Path temporary, Path file) {
        try {
            try {
                Files.move(temporary, file, StandardCopyOption.ATOMIC_MOVE, StandardCopyOption.REPLACE_EXISTING);
            } catch (AtomicMoveNotSupportedException e) {
                Files.move(temporary, file, StandardCopyOption.REPLACE_EXISTING);
            }
        } catch (IOException e) {
            discard(temporary);
            throw new ModelFormatException(file + ": cannot be put in place: " + e, e);
        }
    }

    static void discard(Path temporary) {
        try {
            Files.deleteIfExists(temporary);
        } catch (IOException e) {
            System.getLogger(AtomicFile.class.getName()).log(System.Logger.Level.WARNING, temporary
                    + " was left behind", e);
        }
    }
}
