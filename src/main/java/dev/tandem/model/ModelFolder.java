package dev.tandem.model;

import java.nio.file.Files;
import java.nio.file.Path;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.jspecify.annotations.Nullable;

/**
 * A Hugging Face model folder, opened once and checked as a whole: that the weights are those of the config, and that
 * the tokenizer makes no id that the model lacks.
 *
 * <p>{@link #close} closes tokenizer and weights.
 */
public final class ModelFolder implements AutoCloseable {
    /** Where one of these is, a tokenizer is meant, and must be one that can be read. */
    private static final List<String> TOKENIZER_FILES =
            List.of(Tokenizer.FILE, TokenizerSettings.FILE, "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt");

    private final Path path;
    private final ModelConfig config;
    private final GenerationDefaults generationDefaults;
    private final @Nullable Tokenizer tokenizer;
    private final Safetensors weights;
    private final Map<String, TensorEntry> tensors;

    private ModelFolder(Path path, ModelConfig config, GenerationDefaults generationDefaults, @Nullable Tokenizer tokenizer,
            Safetensors weights, Map<String, TensorEntry> tensors) {
        this.path = path;
        this.config = config;
        this.generationDefaults = generationDefaults;
        this.tokenizer = tokenizer;
        this.weights = weights;
        this.tensors = tensors;
    }

    /**
     * Opens a folder.
     *
     * @param path a folder with config.json, weights in safetensors, and usually tokenizer.json
     * @return the folder; the caller closes it
     * @throws ModelFormatException naming the file and what is wrong with it
     */
    public static ModelFolder open(Path path) {
        if (!Files.isDirectory(path)) {
            throw new ModelFormatException(path
                    + ": expected a folder with config.json, *.safetensors and tokenizer.json, found "
                    + (Files.exists(path) ? "a file" : "nothing"));
        }
        ModelConfig config = ModelConfig.read(path);
        GenerationDefaults defaults = GenerationDefaults.read(path);
        Tokenizer tokenizer = TOKENIZER_FILES.stream().anyMatch(file -> Files.exists(path.resolve(file))) ? Tokenizer.open(path) : null;
        try {
            if (tokenizer != null && tokenizer.vocabSize() > config.vocabSize()) {
                throw new ModelFormatException(path + ": tokenizer.json has token ids up to "
                        + (tokenizer.vocabSize() - 1)
                        + ", but config.json has vocab_size " + config.vocabSize()
                                + "; the tokenizer belongs to another model");
            }
            Safetensors weights = Safetensors.open(path);
            try {
                return new ModelFolder(path, config, defaults, tokenizer, weights,
                        CheckpointTensors.match(config.parameters(), weights));
            } catch (RuntimeException | Error e) {
                weights.close();
                throw e;
            }
        } catch (RuntimeException | Error e) {
            if (tokenizer != null) {
                tokenizer.close();
            }
            throw e;
        }
    }

    /** {@return the folder} */
    public Path path() {
        return path;
    }

    /** {@return what the decoder is} */
    public ModelConfig config() {
        return config;
    }

    /** {@return the authors' advice on sampling} */
    public GenerationDefaults generationDefaults() {
        return generationDefaults;
    }

    /** {@return the tokenizer, closed with this folder; null where the folder has no file of a tokenizer} */
    public @Nullable Tokenizer tokenizer() {
        return tokenizer;
    }

    /** {@return the files of the weights, closed with this folder} */
    public Safetensors weights() {
        return weights;
    }

    /**
     * {@return the tensor of each parameter, by {@link ParameterSpec#name}, in the order of {@link
     * ModelConfig#parameters}}
     */
    public Map<String, TensorEntry> tensors() {
        return tensors;
    }

    /** {@return the tokens that end a generation, from generation_config.json, else config.json, else the tokenizer} */
    public Set<Integer> eosTokenIds() {
        Set<Integer> ids = new LinkedHashSet<>(generationDefaults.eosTokenIds());
        if (ids.isEmpty()) {
            ids.addAll(config.eosTokenIds());
        }
        Integer fromTokenizer = tokenizer == null ? null : tokenizer.eosTokenId();
        if (ids.isEmpty() && fromTokenizer != null) {
            ids.addAll(List.of(fromTokenizer));
        }
        return ids;
    }

    /** Unmaps the weights and frees the tokenizer. A second call does nothing. */
    @Override
    public void close() {
        weights.close();
        if (tokenizer != null) {
            tokenizer.close();
        }
    }
}
