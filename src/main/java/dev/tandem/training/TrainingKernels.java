package dev.tandem.training;

import dev.tandem.device.CublasLt;
import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.KernelModule;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.KernelModule.Source;
import dev.tandem.device.LargeProducts;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Norm;
import dev.tandem.model.RotaryTables;
import java.util.List;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/** Tandem's kernels for training a model on a GPU, the tables they read, and the products and the attention beside them. The owner closes it. */
final class TrainingKernels implements AutoCloseable {
    private static final int MOST_RETAINED = 4768;

    private final List<KernelModule> modules;
    final ModelConfig config;
    final Device device;
    final int multiprocessors;
    final Kernel normForward;
    final Kernel normBackward;
    final Kernel gatedForward;
    final Kernel gatedBackward;
    final Kernel columnSums;
    final Kernel sumPartials;
    final Kernel rotateForward;
    final Kernel rotateBackward;
    final Kernel logprobForward;
    final Kernel logprobBackward;
    final Kernel logprobBackwardFromLogits;
    final Kernel subtractTargets;
    final Kernel scaleRows;
    final @Nullable RotaryTables rotary;
    final AttentionChoice attention;
    private final CublasLt cublas;
    final LargeProducts products;
    /** Blocks that share a row of logits. */
    final int rowBlocks;
    /** Vectors of four logits that a block keeps in its shared memory. */
    final int retained;

    /** {@return what of a model these kernels do not compute, or null if they compute all of it} */
    static @Nullable String obstacle(ModelConfig config, DType dtype) {
        int dim = config.headDim();
        if (dtype != DType.BFLOAT16) {
            return "weights are " + dtype + ", not BFLOAT16";
        }
        if (dim != 64 && dim != 96 && dim != 128 && dim != 256) {
            return "heads have " + dim + " channels, not 64, 96, 128 or 256";
        }
        if (config.hiddenSize() % 8 != 0 || config.intermediateSize() % 8 != 0 || config.hiddenSize() > 10240) {
            return "widths are no multiples of 8, or beyond 10,240";
        }
        return null;
    }

    /**
     * Compiles and loads them.
     *
     * @throws dev.tandem.device.TandemException when a kernel cannot be compiled; nothing is held then
     */
    TrainingKernels(ModelConfig config, Device device) {
        this.config = config;
        this.device = device;
        multiprocessors = Cuda.multiprocessors(device);
        int vectors = Math.ceilDiv(config.vocabSize(), 4);
        int blocks = 1;
        while (blocks < 8 && Math.ceilDiv(vectors, blocks) > MOST_RETAINED) {
            blocks *= 2;
        }
        rowBlocks = blocks;
        retained = Math.min(MOST_RETAINED, Math.ceilDiv(vectors, blocks));
        modules = KernelModule.load(device, List.of(
                new Source("train_norm.cu", Map.of("LAYER_NORM", config.norm() == Norm.LAYER ? "1" : "0")),
                new Source("train_layer.cu",
                        Map.of("GATED", config.gatedMlp() ? "1" : "0", "ACTIVATION", "" + config.activation().kernelNumber())),
                new Source("train_rotary.cu", Map.of("HEAD_DIM", "" + config.headDim())),
                new Source("logprob.cu", Map.of("CTAS", "" + rowBlocks))));
        normForward = modules.get(0).kernel("normForward");
        normBackward = modules.get(0).kernel("normBackward");
        gatedForward = modules.get(1).kernel("gatedForward");
        gatedBackward = modules.get(1).kernel("gatedBackward");
        columnSums = modules.get(1).kernel("columnSums");
        sumPartials = modules.get(1).kernel("sumPartials");
        rotateForward = modules.get(2).kernel("rotateForward");
        rotateBackward = modules.get(2).kernel("rotateBackward");
        logprobForward = modules.get(3).kernel("logprobForward").sharedMemory(16 * retained);
        logprobBackward = modules.get(3).kernel("logprobBackward");
        logprobBackwardFromLogits = modules.get(3).kernel("logprobBackwardFromLogits");
        subtractTargets = modules.get(3).kernel("subtractTargets");
        scaleRows = modules.get(3).kernel("scaleRows");
        rotary = RotaryTables.of(config, device);
        attention = new AttentionChoice(config, device);
        cublas = new CublasLt(device);
        products = new LargeProducts(device, cublas);
    }

    @Override
    public void close() {
        products.close();
        cublas.close();
        attention.close();
        modules.forEach(KernelModule::close);
        if (rotary != null) {
            rotary.close();
        }
    }
}
