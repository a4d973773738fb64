package dev.tandem.testing;

import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.net.URISyntaxException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Objects;
import java.util.stream.Stream;

/** A tiny checkpoint with the answers that transformers computed for it in float64. */
public record Fixture(String family, Path folder, JsonObject golden) {
    public static final List<String> FAMILIES = List.of("llama", "qwen2", "qwen3", "opt");

    public static Fixture of(String family) {
        Path folder = folder(family);
        try {
            return new Fixture(family, folder, JsonParser.parseString(Files.readString(folder.resolve("golden.json"))).getAsJsonObject());
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    /** A folder under fixtures among the test's resources, wherever the tests are started. */
    public static Path folder(String name) {
        try {
            return Path.of(Objects.requireNonNull(Fixture.class.getResource("/fixtures/" + name)).toURI());
        } catch (URISyntaxException e) {
            throw new IllegalStateException(e);
        }
    }

    public static Stream<Fixture> all() {
        return FAMILIES.stream().map(Fixture::of);
    }

    public static int[] ints(JsonArray array) {
        int[] values = new int[array.size()];
        for (int i = 0; i < values.length; i++) {
            values[i] = array.get(i).getAsInt();
        }
        return values;
    }

    public static double[] doubles(JsonArray array) {
        double[] values = new double[array.size()];
        for (int i = 0; i < values.length; i++) {
            values[i] = array.get(i).getAsDouble();
        }
        return values;
    }

    @Override
    public String toString() {
        return family;
    }
}
