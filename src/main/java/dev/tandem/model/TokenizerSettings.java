package dev.tandem.model;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/**
 * What stands beside {@code tokenizer.json}: special tokens by their use, and the chat template.
 *
 * @param specialTokens {@code bos_token}, {@code eos_token}, … to the token, those that there are; a chat
 *     template sees them as variables
 * @param chatTemplate the template, or null
 */
record TokenizerSettings(Map<String, String> specialTokens, @Nullable ChatTemplate chatTemplate) {
    static final String FILE = "tokenizer_config.json";
    static final String SPECIAL_TOKENS = "special_tokens_map.json";
    static final String CHAT_TEMPLATE = "chat_template.jinja";
    private static final List<String> USES = List.of("bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
            "cls_token",
            "mask_token");
    private static final long LARGEST_TEMPLATE = 4 << 20;

    static TokenizerSettings read(Path folder) {
        Map<String, String> specialTokens = new LinkedHashMap<>();
        for (String name : List.of(SPECIAL_TOKENS, FILE)) {
            Path file = folder.resolve(name);
            if (Files.exists(file)) {
                JsonFields fields = JsonFields.read(file);
                USES.forEach(use -> readToken(fields, use, specialTokens));
            }
        }
        return new TokenizerSettings(specialTokens, readTemplate(folder, specialTokens));
    }

    /** A token is written as a string or as an object with its content. */
    private static void readToken(JsonFields fields, String use, Map<String, String> specialTokens) {
        boolean object = fields.has(use) && fields.object().get(use) instanceof JsonObject;
        JsonFields inner = object ? fields.fields(use) : null;
        String token = inner == null ? fields.text(use) : inner.text("content");
        if (token != null) {
            specialTokens.put(use, token);
        } else if (inner != null) {
            throw inner.wrong("content", "the token");
        }
    }

    /** A file of its own comes before tokenizer_config.json, as in transformers. */
    private static @Nullable ChatTemplate readTemplate(Path folder, Map<String, String> specialTokens) {
        Path file = folder.resolve(CHAT_TEMPLATE);
        if (Files.exists(file)) {
            return ChatTemplate.parse(file.toString(), StrictJson.readText(file, LARGEST_TEMPLATE), specialTokens);
        }
        Path config = folder.resolve(FILE);
        if (!Files.exists(config)) {
            return null;
        }
        JsonFields fields = JsonFields.read(config);
        String text = fields.has("chat_template") && fields.object().get("chat_template") instanceof JsonArray named
                ? defaultOf(fields, named) : fields.text("chat_template");
        return text == null ? null : ChatTemplate.parse(config.toString(), text, specialTokens);
    }

    private static String defaultOf(JsonFields fields, JsonArray named) {
        for (JsonElement element : named) {
            JsonFields template = JsonFields.of(fields.source() + ": chat_template", element);
            if ("default".equals(template.text("name"))) {
                String text = template.text("template");
                if (text == null) {
                    throw template.wrong("template", "the template's text");
                }
                return text;
            }
        }
        throw fields.wrong("chat_template", "a template named \"default\" among the named ones");
    }
}
