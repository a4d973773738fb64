package dev.tandem.model;

import com.google.gson.stream.JsonReader;
import com.google.gson.stream.JsonToken;
import java.io.IOException;
import java.util.HashMap;
import java.util.Map;

/**
 * The tokens that {@code tokenizer.json} names, read past its merges in one pass: BPE, WordPiece and WordLevel list
 * tokens with their ids, Unigram in their order; added tokens come on top.
 */
final class Vocabulary {
    private final Map<String, Integer> ids = new HashMap<>();
    private int size;

    private Vocabulary() {}

    static Vocabulary read(String source, String text) {
        Vocabulary vocabulary = new Vocabulary();
        try (JsonReader reader = StrictJson.reader(text)) {
            reader.beginObject();
            while (reader.hasNext()) {
                switch (reader.nextName()) {
                    case "model" -> vocabulary.readModel(reader);
                    case "added_tokens" -> vocabulary.readAdded(reader);
                    default -> reader.skipValue();
                }
            }
            reader.endObject();
        } catch (IOException | IllegalStateException | NumberFormatException e) {
            throw StrictJson.malformed(source, e);
        }
        if (vocabulary.size == 0) {
            throw new ModelFormatException(source + ": field \"model.vocab\": expected tokens, found none");
        }
        return vocabulary;
    }

    private void readModel(JsonReader reader) throws IOException {
        reader.beginObject();
        while (reader.hasNext()) {
            if (!reader.nextName().equals("vocab")) {
                reader.skipValue();
            } else if (reader.peek() == JsonToken.BEGIN_OBJECT) {
                reader.beginObject();
                while (reader.hasNext()) {
                    add(reader.nextName(), reader.nextInt());
                }
                reader.endObject();
            } else {
                readUnigram(reader);
            }
        }
        reader.endObject();
    }

    private void readUnigram(JsonReader reader) throws IOException {
        reader.beginArray();
        for (int id = 0; reader.hasNext(); id++) {
            reader.beginArray();
            add(reader.nextString(), id);
            reader.skipValue();
            reader.endArray();
        }
        reader.endArray();
    }

    private void readAdded(JsonReader reader) throws IOException {
        reader.beginArray();
        while (reader.hasNext()) {
            String content = "";
            int id = -1;
            reader.beginObject();
            while (reader.hasNext()) {
                switch (reader.nextName()) {
                    case "content" -> content = reader.nextString();
                    case "id" -> id = reader.nextInt();
                    default -> reader.skipValue();
                }
            }
            reader.endObject();
            add(content, id);
        }
        reader.endArray();
    }

    private void add(String token, int id) {
        if (id < 0 || id == Integer.MAX_VALUE) {
            throw new IllegalStateException("token \"" + StrictJson.brief(token) + "\" has the id " + id);
        }
        ids.put(token, id);
        size = Math.max(size, id + 1);
    }

    /** One more than the largest id. */
    int size() {
        return size;
    }

    /** The id of a token, or -1. */
    int id(String token) {
        return ids.getOrDefault(token, -1);
    }
}
