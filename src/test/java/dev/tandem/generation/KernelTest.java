package dev.tandem.generation;

import dev.tandem.device.Cuda;
import dev.tandem.device.KernelModule;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.CudaTest;
import java.util.ArrayList;
import java.util.List;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterEach;

/** Frame of the tests of single kernels of a step, which are compared with libtorch's operations. */
abstract class KernelTest extends CudaTest {
    private final List<KernelModule> modules = new ArrayList<>();

    @AfterEach
    void unload() {
        Cuda.synchronize(CUDA);
        modules.forEach(KernelModule::close);
    }

    /** Sources as they are compiled for a model, closed after the test. */
    List<KernelModule> load(ModelConfig config, GeneratorOptions options, String... files) {
        List<KernelModule> loaded = KernelModule.load(CUDA,
                Stream.of(files).map(file -> CudaKernels.source(file, config, options, CudaDecoder.split(config))).toList());
        modules.addAll(loaded);
        return loaded;
    }
}
