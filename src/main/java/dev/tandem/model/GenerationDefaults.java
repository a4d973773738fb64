package dev.tandem.model;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonPrimitive;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * How a model's authors advise to sample from it: {@code generation_config.json}. What the file does not say is null
 * (or empty), so that whoever samples can tell advice from absence.
 *
 * @param eosTokenIds tokens that end a generation
 * @param padTokenId the token for padding
 * @param doSample false for greedy decoding
 * @param temperature divides the logits
 * @param topK how many of the likeliest tokens are kept, 0 for all
 * @param topP the probability mass that is kept
 * @param repetitionPenalty divides positive and multiplies negative logits of tokens already seen
 */
public record GenerationDefaults(List<Integer> eosTokenIds, @Nullable Integer padTokenId, @Nullable Boolean doSample,
        @Nullable Double temperature, @Nullable Integer topK, @Nullable Double topP,
                @Nullable Double repetitionPenalty) {
    private static final String FILE = "generation_config.json";

    /** Copies the list. */
    public GenerationDefaults {
        eosTokenIds = List.copyOf(eosTokenIds);
    }

    /** {@return no advice at all} */
    public static GenerationDefaults none() {
        return new GenerationDefaults(List.of(), null, null, null, null, null, null);
    }

    /**
     * Reads {@code generation_config.json}; a folder without it gives no advice.
     *
     * @param folder a Hugging Face folder
     * @return what the file says
     * @throws ModelFormatException when the file is malformed
     */
    public static GenerationDefaults read(Path folder) {
        Path file = folder.resolve(FILE);
        if (!Files.exists(file)) {
            return none();
        }
        JsonFields fields = JsonFields.read(file);
        Integer topK = fields.tokenId("top_k", null);
        return new GenerationDefaults(fields.tokenIds("eos_token_id", List.of()), fields.tokenId("pad_token_id", null),
                fields.has("do_sample") ? fields.flag("do_sample", false) : null,
                positive(fields, "temperature", true, Double.MAX_VALUE), topK, positive(fields, "top_p", false, 1),
                positive(fields, "repetition_penalty", false, Double.MAX_VALUE));
    }

    private static @Nullable Double positive(JsonFields fields, String name, boolean orZero, double most) {
        Double value = fields.optionalNumber(name);
        boolean enough = value == null || value > 0 || (orZero && value == 0);
        if (!enough || (value != null && value > most)) {
            throw fields.wrong(name, orZero ? "a number of at least 0" : "a number above 0"
                    + (most == 1 ? " and at most 1" : ""));
        }
        return value;
    }

    /**
     * Writes {@code generation_config.json}.
     *
     * @param folder an existing folder
     */
    public void write(Path folder) {
        JsonObject json = new JsonObject();
        json.add("eos_token_id", idsToJson(eosTokenIds));
        json.addProperty("pad_token_id", padTokenId);
        if (doSample != null) {
            json.addProperty("do_sample", doSample);
        }
        addIfPresent(json, "temperature", temperature);
        addIfPresent(json, "top_k", topK);
        addIfPresent(json, "top_p", topP);
        addIfPresent(json, "repetition_penalty", repetitionPenalty);
        AtomicFile.write(folder.resolve(FILE), StrictJson.print(json));
    }

    private static void addIfPresent(JsonObject json, String name, @Nullable Number value) {
        if (value != null) {
            json.addProperty(name, value);
        }
    }

    /** transformers writes one id as a number, several as a list, none as null. */
    static JsonElement idsToJson(List<Integer> ids) {
        if (ids.isEmpty()) {
            return JsonNull.INSTANCE;
        }
        if (ids.size() == 1) {
            return new JsonPrimitive(ids.getFirst());
        }
        JsonArray array = new JsonArray();
        ids.forEach(array::add);
        return array;
    }
}
