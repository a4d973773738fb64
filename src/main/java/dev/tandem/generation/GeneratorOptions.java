package dev.tandem.generation;

/**
 * How a rank generates.
 *
 * @param blockSize tokens of a KV page
 * @param tokenBudget most tokens that one step runs through the model
 * @param maxRunning most samples that hold KV pages at the same time
 * @param prefillThreshold most tokens of one prompt in one step
 * @param reserveFull whether a sample is admitted only when pages for all its tokens are free; then nothing is ever preempted
 * @param prefixCaching whether pages are shared between prompts that begin alike
 */
public record GeneratorOptions(int blockSize, int tokenBudget, int maxRunning, int prefillThreshold, boolean reserveFull,
        boolean prefixCaching) {

    /** Checks the numbers. */
    public GeneratorOptions {
        check("blockSize", blockSize >= 1, blockSize);
        check("maxRunning", maxRunning >= 1, maxRunning);
        check("tokenBudget", tokenBudget >= maxRunning, tokenBudget);
        check("prefillThreshold", prefillThreshold >= 1, prefillThreshold);
    }

    private static void check(String name, boolean good, int value) {
        if (!good) {
            throw new IllegalArgumentException("GeneratorOptions." + name + " is out of range: " + value
                    + " (the token budget must be at least the number of running samples)");
        }
    }

    /** {@return pages of 16 tokens, 2,048 tokens a step, 256 running samples, prefix caching} */
    public static GeneratorOptions defaults() {
        return new GeneratorOptions(16, 2048, 256, 2048, false, true);
    }

    /** {@return what suits a GPU: pages of 64 tokens, 16,384 tokens a step, 512 running samples, prefix caching} */
    public static GeneratorOptions forGpu() {
        return new GeneratorOptions(64, 16_384, 512, 16_384, false, true);
    }

    /** {@return these options with pages of another size} */
    public GeneratorOptions blockSize(int value) {
        return new GeneratorOptions(value, tokenBudget, maxRunning, prefillThreshold, reserveFull, prefixCaching);
    }

    /** {@return these options with other bounds of a step} */
    public GeneratorOptions step(int tokens, int samples, int promptTokens) {
        return new GeneratorOptions(blockSize, tokens, samples, promptTokens, reserveFull, prefixCaching);
    }

    /** {@return these options with or without reserving pages for whole samples} */
    public GeneratorOptions reserveFull(boolean value) {
        return new GeneratorOptions(blockSize, tokenBudget, maxRunning, prefillThreshold, value, prefixCaching);
    }

    /** {@return these options with or without the prefix cache} */
    public GeneratorOptions prefixCaching(boolean value) {
        return new GeneratorOptions(blockSize, tokenBudget, maxRunning, prefillThreshold, reserveFull, value);
    }
}
