package dev.tandem.training;

/**
 * What one optimizer step did.
 *
 * @param step its number, from 1; skipped steps count
 * @param loss summed over all micro-batches and ranks
 * @param gradientNorm global norm before clipping
 * @param lr the learning rate
 * @param skipped whether loss or gradient was not finite and the weights were left alone
 * @param tokens that the model read
 * @param seconds from packing until this was known
 */
public record TrainStep(long step, double loss, double gradientNorm, double lr, boolean skipped, long tokens, double seconds) {
    @Override
    public String toString() {
        return "step %d: loss %.4f, gradient norm %.3f, lr %.2e, %d tokens in %.2f s%s"
                .formatted(step, loss, gradientNorm, lr, tokens, seconds, skipped ? ", SKIPPED" : "");
    }
}
