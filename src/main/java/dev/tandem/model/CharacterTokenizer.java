package dev.tandem.model;

import com.google.gson.JsonArray;
import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import java.nio.file.Path;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.SequencedSet;

/**
 * Writes a character-level tokenizer in the format of Hugging Face's library: a BPE model without merges, which
 * leaves every character alone, decoded by joining the pieces. Both Tandem and transformers open it.
 */
final class CharacterTokenizer {
    private static final String TEMPLATE = """
            {% for message in messages %}\
            {{ bos_token + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}\
            {% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}""";

    private CharacterTokenizer() {}

    static void write(Path folder, String alphabet, List<String> specialTokens) {
        SequencedSet<String> special = new LinkedHashSet<>(List.of("<pad>", "<bos>", "<eos>"));
        special.addAll(specialTokens);
        SequencedSet<String> all = new LinkedHashSet<>(special);
        alphabet.codePoints().forEach(c -> all.add(Character.toString(c)));
        if (all.size() < special.size() + alphabet.codePointCount(0, alphabet.length()) || special.contains("")) {
            throw new IllegalArgumentException("A character tokenizer's alphabet and special tokens must be distinct"
                    + " and not empty, found alphabet \"" + alphabet + "\" and special tokens " + special);
        }
        JsonObject vocabulary = new JsonObject();
        JsonArray added = new JsonArray();
        all.forEach(token -> vocabulary.addProperty(token, vocabulary.size()));
        special.forEach(token -> {
            JsonObject entry = JsonParser.parseString("""
                    {"single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}
                    """).getAsJsonObject();
            entry.addProperty("id", vocabulary.get(token).getAsInt());
            entry.addProperty("content", token);
            added.add(entry);
        });
        JsonObject model = JsonParser.parseString("""
                {"type": "BPE", "dropout": null, "unk_token": "<pad>", "continuing_subword_prefix": null,
                 "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                 "merges": []}""").getAsJsonObject();
        model.add("vocab", vocabulary);
        JsonObject tokenizer = new JsonObject();
        tokenizer.addProperty("version", "1.0");
        tokenizer.add("truncation", JsonNull.INSTANCE);
        tokenizer.add("padding", JsonNull.INSTANCE);
        tokenizer.add("added_tokens", added);
        tokenizer.add("normalizer", JsonNull.INSTANCE);
        tokenizer.add("pre_tokenizer", JsonNull.INSTANCE);
        tokenizer.add("post_processor", JsonNull.INSTANCE);
        tokenizer.add("decoder", JsonParser.parseString("{\"type\": \"Fuse\"}"));
        tokenizer.add("model", model);
        AtomicFile.write(folder.resolve(Tokenizer.FILE), StrictJson.print(tokenizer));
        JsonObject settings = JsonParser.parseString("""
                {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<bos>",
                 "eos_token": "<eos>", "clean_up_tokenization_spaces": false}""").getAsJsonObject();
        settings.addProperty("chat_template", TEMPLATE);
        AtomicFile.write(folder.resolve(TokenizerSettings.FILE), StrictJson.print(settings));
    }
}
