package dev.tandem.generation;

import dev.tandem.device.Device;
import dev.tandem.device.KernelModule;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.KernelModule.Source;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Norm;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;

/** The kernels of a step, specialised for a model. The owner closes them when nothing runs. */
final class CudaKernels implements AutoCloseable {
    private final List<KernelModule> modules;
    final Kernel resolveTokens;
    final Kernel embed;
    final Kernel residualNorm;
    final Kernel gatherNorm;
    final Kernel rotateAndWrite;
    final Kernel activate;
    final Kernel planDecode;
    final Kernel decodeAttention;
    final Kernel prefillAttention;
    final Kernel markSeen;
    final Kernel samplePartial;
    final Kernel samplePartialEdited;
    final Kernel sampleFinish;
    final Kernel sampleTruncated;

    /**
     * Compiles and loads them.
     *
     * @param split tokens that one block of the decode attention attends to
     * @throws dev.tandem.device.TandemException when a kernel cannot be compiled; nothing is held then
     */
    CudaKernels(Device device, ModelConfig config, GeneratorOptions options, int split) {
        modules = KernelModule.load(device,
                Stream.of("step.cu", "layer.cu", "decode_attention.cu", "prefill_attention.cu", "sampling.cu", "truncation.cu")
                        .map(file -> source(file, config, options, split)).toList());
        resolveTokens = modules.get(0).kernel("resolveTokens");
        embed = modules.get(1).kernel("embed");
        residualNorm = modules.get(1).kernel("residualNorm");
        gatherNorm = modules.get(1).kernel("gatherNorm");
        rotateAndWrite = modules.get(1).kernel("rotateAndWrite");
        activate = modules.get(1).kernel("activate");
        planDecode = modules.get(2).kernel("planDecode");
        decodeAttention = modules.get(2).kernel("decodeAttention");
        prefillAttention = modules.get(3).kernel("prefillAttention");
        markSeen = modules.get(4).kernel("markSeen");
        samplePartial = modules.get(4).kernel("samplePartial");
        samplePartialEdited = modules.get(4).kernel("samplePartialEdited");
        sampleFinish = modules.get(4).kernel("sampleFinish");
        sampleTruncated = modules.get(5).kernel("sampleTruncated");
    }

    /**
     * {@return one of the sources of a step's kernels, with the macros that a model needs}
     *
     * @param split tokens that one block of the decode attention attends to
     */
    static Source source(String file, ModelConfig config, GeneratorOptions options, int split) {
        Map<String, String> shape = shape(config, options);
        return new Source(file, switch (file) {
            case "step.cu" -> Map.of();
            case "layer.cu" -> both(shape, Map.of(
                    "LAYER_NORM", config.norm() == Norm.LAYER ? "1" : "0",
                    "POST_NORM", "0",
                    "FINAL_NORM", "1",
                    "GATED", config.gatedMlp() ? "1" : "0",
                    "ACTIVATION", "" + config.activation().kernelNumber(),
                    "WRITE_BACK", "0"));
            case "decode_attention.cu" -> both(shape, Map.of("SPLIT", "" + split));
            case "prefill_attention.cu" -> shape;
            case "sampling.cu", "truncation.cu" -> Map.of("MAX_MASKED", "" + StepLayout.MAX_MASKED);
            default -> throw new IllegalArgumentException(file);
        });
    }

    /** {@return the macros of kernels that know heads and pages} */
    static Map<String, String> shape(ModelConfig config, GeneratorOptions options) {
        return Map.of("HEAD_DIM", "" + config.headDim(), "HEADS", "" + config.heads(), "KV_HEADS", "" + config.kvHeads(),
                "BLOCK_SIZE", "" + options.blockSize());
    }

    /** {@return the entries of two maps} */
    static Map<String, String> both(Map<String, String> a, Map<String, String> b) {
        Map<String, String> all = new HashMap<>(a);
        all.putAll(b);
        return all;
    }

    @Override
    public void close() {
        modules.forEach(KernelModule::close);
    }
}
