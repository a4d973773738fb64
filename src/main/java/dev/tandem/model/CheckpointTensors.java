package dev.tandem.model;

import dev.tandem.device.DType;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.jspecify.annotations.Nullable;

/**
 * Finds in a checkpoint the tensors that a model needs.
 *
 * <p>Checkpoints of one family differ in three harmless ways, and only these are forgiven: a model exported without
 * its head drops the prefix {@code model.} from all names; a tied LM head may be stored beside the embeddings (or
 * instead of them); and old exports carry {@code rotary_emb.inv_freq}, which follows from the config. Anything else
 * that is missing, left over or of another shape means that config and weights do not belong together.
 */
final class CheckpointTensors {
    private static final String PREFIX = "model.";
    private static final String LM_HEAD = "lm_head.weight";
    private static final String IGNORED_SUFFIX = ".rotary_emb.inv_freq";

    private CheckpointTensors() {}

    /**
     * Checks that a checkpoint has exactly the tensors of a model, in their shapes and in a floating-point type.
     *
     * @throws ModelFormatException naming file, tensor, expected, found
     */
    static void check(List<ParameterSpec> parameters, Safetensors checkpoint) {
        match(parameters, checkpoint);
    }

    /**
     * As {@link #check}.
     *
     * @return the tensor of each parameter by {@link ParameterSpec#name}, in the order of {@code parameters}
     */
    static Map<String, TensorEntry> match(List<ParameterSpec> parameters, Safetensors checkpoint) {
        Map<String, TensorEntry> matched = new LinkedHashMap<>();
        Set<String> used = new HashSet<>();
        List<String> missing = new ArrayList<>();
        boolean tied = parameters.stream().noneMatch(parameter -> parameter.role() == ParameterRole.LM_HEAD);
        for (ParameterSpec parameter : parameters) {
            String name = nameInFile(parameter, checkpoint, tied);
            if (name == null) {
                missing.add(parameter.name());
                continue;
            }
            TensorEntry tensor = checkpoint.tensor(name);
            checkTensor(parameter.shape(), tensor, checkpoint);
            matched.put(parameter.name(), tensor);
            used.add(name);
            if (tied && parameter.role() == ParameterRole.EMBED_TOKENS && checkpoint.contains(LM_HEAD)
                    && used.add(LM_HEAD)) {
                checkTensor(parameter.shape(), checkpoint.tensor(LM_HEAD), checkpoint);
            }
        }
        if (!missing.isEmpty()) {
            throw new ModelFormatException(checkpoint.source() + ": " + some(missing) + " missing; the config asks for "
                    + parameters.size() + " tensors, the files hold " + checkpoint.names().size());
        }
        List<String> extra = checkpoint.names().stream()
                .filter(name -> !used.contains(name) && !name.endsWith(IGNORED_SUFFIX)).toList();
        if (!extra.isEmpty()) {
            throw new ModelFormatException(checkpoint.file(extra.getFirst()) + ": " + some(extra)
                    + " in the files but not part of the model that config.json describes");
        }
        return matched;
    }

    private static @Nullable String nameInFile(ParameterSpec parameter, Safetensors checkpoint, boolean tied) {
        String name = parameter.name();
        if (checkpoint.contains(name)) {
            return name;
        }
        if (name.startsWith(PREFIX) && checkpoint.contains(name.substring(PREFIX.length()))) {
            return name.substring(PREFIX.length());
        }
        return tied && parameter.role() == ParameterRole.EMBED_TOKENS && checkpoint.contains(LM_HEAD) ? LM_HEAD : null;
    }

    private static void checkTensor(long[] shape, TensorEntry tensor, Safetensors checkpoint) {
        if (!Arrays.equals(shape, tensor.shape())) {
            throw new ModelFormatException(checkpoint.file(tensor.name()) + ": tensor " + tensor.name()
                    + ": config.json asks for shape "
                    + Arrays.toString(shape) + ", found " + Arrays.toString(tensor.shape()));
        }
        if (!tensor.dtype().floating() || tensor.dtype() == DType.FLOAT64) {
            throw new ModelFormatException(checkpoint.file(tensor.name()) + ": tensor " + tensor.name()
                    + ": expected weights in F32, BF16 or F16, found " + tensor.dtype().safetensorsName());
        }
    }

    private static String some(List<String> names) {
        return names.size() == 1 ? "tensor " + StrictJson.brief(names.getFirst()) + " is"
                : names.size() + " tensors (" + StrictJson.brief(String.join(", ",
                        names.subList(0, Math.min(3, names.size()))))
                        + (names.size() > 3 ? ", …" : "") + ") are";
    }
}
