package dev.tandem.model;

import ai.djl.huggingface.tokenizers.Encoding;
import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.logging.Level;
import java.util.logging.Logger;
import org.jspecify.annotations.Nullable;

/**
 * Text to token ids and back, as {@code tokenizer.json} says, with the special tokens and the chat template of the
 * files beside it.
 *
 * <p>The work is done by the Rust library that transformers uses too, so ids are equal by construction; what is added
 * here is what that library leaves to Python: which tokens are special for what, the chat template, the size of the
 * vocabulary.
 *
 * <p>Safe for use by several threads, {@link #close} excepted. {@link #close} frees the native memory; what was
 * encoded stays valid.
 */
public final class Tokenizer implements AutoCloseable {
    static final String FILE = "tokenizer.json";
    private static final long LARGEST = 256 << 20;

    /** Held, because a logger that nobody holds forgets its level. */
    private static final Logger LIBRARY_LOGGER = Logger.getLogger("ai.djl");

    static {
        // It announces on the console that it unpacks its native code, unless the application has asked to hear that.
        if (LIBRARY_LOGGER.getLevel() == null) {
            LIBRARY_LOGGER.setLevel(Level.WARNING);
        }
        // The library reports each loaded engine to its makers unless told not to.
        System.setProperty("OPT_OUT_TRACKING", "true");
    }

    private final Path folder;
    static {
        // On a machine with a GPU the library would else download another build of itself, which tokenizes no faster.
        if (System.getProperty("RUST_FLAVOR") == null) {
            System.setProperty("RUST_FLAVOR", "cpu");
        }
    }

    private final HuggingFaceTokenizer tokenizer;
    private final Vocabulary vocabulary;
    private final TokenizerSettings settings;

    private Tokenizer(Path folder, HuggingFaceTokenizer tokenizer, Vocabulary vocabulary, TokenizerSettings settings) {
        this.folder = folder;
        this.tokenizer = tokenizer;
        this.vocabulary = vocabulary;
        this.settings = settings;
    }

    /**
     * Opens the tokenizer of a folder: {@code tokenizer.json}, and where they exist {@code tokenizer_config.json},
     * {@code special_tokens_map.json} and {@code chat_template.jinja}.
     *
     * @param folder a Hugging Face folder
     * @return the tokenizer; the caller closes it
     * @throws ModelFormatException naming the file and the field that is wrong
     */
    public static Tokenizer open(Path folder) {
        Path file = folder.resolve(FILE);
        if (!Files.exists(file)) {
            throw new ModelFormatException(file
                    + ": there is no such file; a tokenizer in another format must be saved once with"
                    + " transformers' AutoTokenizer (use_fast=True)");
        }
        String text = StrictJson.readText(file, LARGEST);
        Vocabulary vocabulary = Vocabulary.read(file.toString(), text);
        TokenizerSettings settings = TokenizerSettings.read(folder);
        HuggingFaceTokenizer tokenizer;
        try {
            // Off, because padding and truncation are the scheduler's business and the library's defaults cut long
            // texts.
            Map<String, String> options = Map.of("padding", "false", "truncation", "false");
            ByteArrayInputStream bytes = new ByteArrayInputStream(text.getBytes(StandardCharsets.UTF_8));
            tokenizer = HuggingFaceTokenizer.newInstance(bytes, options);
        } catch (IOException | RuntimeException e) {
            throw new ModelFormatException(file + ": cannot be loaded: " + e.getMessage(), e);
        }
        return new Tokenizer(folder, tokenizer, vocabulary, settings);
    }

    /**
     * Writes the files of a tokenizer with one token per character, for models that are made rather than downloaded.
     * Ids 0, 1 and 2 are {@code <pad>}, {@code <bos>} and {@code <eos>}, then come the further special tokens, then
     * the alphabet.
     *
     * @param folder an existing folder
     * @param alphabet the characters; any other becomes {@code <pad>}
     * @param specialTokens further special tokens
     */
    public static void writeCharacters(Path folder, String alphabet, List<String> specialTokens) {
        CharacterTokenizer.write(folder, alphabet, specialTokens);
    }

    /**
     * {@return its token ids}
     *
     * @param text any text
     * @param addSpecialTokens whether the tokens that the model expects around a text (such as BOS) are added; a
     *     rendered chat template has them already
     */
    public int[] encode(String text, boolean addSpecialTokens) {
        return ids(tokenizer.encode(text, addSpecialTokens, false));
    }

    /**
     * Encodes several texts, in parallel in native code.
     *
     * @param texts any texts
     * @param addSpecialTokens as for {@link #encode}
     * @return the token ids of each
     */
    public List<int[]> encodeAll(List<String> texts, boolean addSpecialTokens) {
        if (texts.isEmpty()) {
            return List.of();
        }
        return Arrays.stream(tokenizer.batchEncode(texts, addSpecialTokens, false)).map(Tokenizer::ids).toList();
    }

    private static int[] ids(Encoding encoding) {
        return Arrays.stream(encoding.getIds()).mapToInt(Math::toIntExact).toArray();
    }

    /**
     * {@return the text; incomplete UTF-8 at an end becomes U+FFFD}
     *
     * @param ids token ids
     * @param from the first to decode
     * @param to after the last to decode
     * @param skipSpecialTokens whether special tokens are left out
     */
    public String decode(int[] ids, int from, int to, boolean skipSpecialTokens) {
        if (from == to) {
            return "";
        }
        return tokenizer.decode(Arrays.stream(ids, from, to).asLongStream().toArray(), skipSpecialTokens);
    }

    /**
     * {@return the text}
     *
     * @param ids token ids
     * @param skipSpecialTokens whether special tokens are left out
     */
    public String decode(int[] ids, boolean skipSpecialTokens) {
        return decode(ids, 0, ids.length, skipSpecialTokens);
    }

    /** {@return one more than the largest token id} */
    public int vocabSize() {
        return vocabulary.size();
    }

    /**
     * {@return its id, or -1}
     *
     * @param token a token as the vocabulary spells it
     */
    public int id(String token) {
        return vocabulary.id(token);
    }

    /** {@return the id of the token that starts a text, or null} */
    public @Nullable Integer bosTokenId() {
        return specialId("bos_token");
    }

    /** {@return the id of the token that ends a text or a turn, or null} */
    public @Nullable Integer eosTokenId() {
        return specialId("eos_token");
    }

    /** {@return the id of the token for padding, or null} */
    public @Nullable Integer padTokenId() {
        return specialId("pad_token");
    }

    private @Nullable Integer specialId(String name) {
        String token = settings.specialTokens().get(name);
        return token == null || id(token) < 0 ? null : (Integer) id(token);
    }

    /** {@return the model's chat template, or null when it has none} */
    public @Nullable ChatTemplate chatTemplate() {
        return settings.chatTemplate();
    }

    /**
     * Copies the tokenizer's files, chat template included, so that a saved model is complete.
     *
     * @param target an existing folder
     * @throws ModelFormatException when a file cannot be copied
     */
    public void copyTo(Path target) {
        for (String name : List.of(FILE, TokenizerSettings.FILE, TokenizerSettings.SPECIAL_TOKENS,
                TokenizerSettings.CHAT_TEMPLATE)) {
            Path from = folder.resolve(name);
            try {
                if (Files.exists(from) && !(Files.exists(target.resolve(name))
                        && Files.isSameFile(from, target.resolve(name)))) {
                    Files.copy(from, target.resolve(name), StandardCopyOption.REPLACE_EXISTING);
                }
            } catch (IOException e) {
                throw new ModelFormatException(from + ": cannot be copied to " + target + ": " + e, e);
            }
        }
    }

    /** Frees the native memory. A second call does nothing. */
    @Override
    public void close() {
        tokenizer.close();
    }
}
