package dev.tandem.device;

import dev.tandem.device.CublasLt.Product;
import dev.tandem.device.CublasLt.Shape;
import java.util.HashMap;
import java.util.Map;
import java.util.Optional;

/**
 * Products of many rows with a weight on a GPU, such as those of training and of prompts, by the algorithms of cuBLAS that timing finds to
 * be the fastest: for most shapes that is not the library's first choice. Numbers of rows differ from one micro-batch to the next, so one
 * algorithm serves all numbers up to the next power of two. It is looked for when such a product is first asked for, and kept
 * ({@link TuningCache}). Few rows, and what cuBLAS refuses, are multiplied by libtorch.
 *
 * <p>Confined to the thread of its device. The owner closes it.
 */
public final class LargeProducts implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(LargeProducts.class.getName());

    /** With fewer rows, what an algorithm gains is lost between kernels. */
    private static final int LEAST_ROWS = 1024;

    private final CublasLt cublas;
    private final TuningCache choices;
    /** Empty where cuBLAS has nothing. */
    private final Map<Question, Optional<Product>> found = new HashMap<>();

    private record Question(int like, Shape shape) {}

    /** @param cublas that multiplies; it stays open */
    public LargeProducts(Device device, CublasLt cublas) {
        this.cublas = cublas;
        choices = TuningCache.of(device);
    }

    /**
     * Rows times the transpose of a weight.
     *
     * @param x BFLOAT16 [m, k]
     * @param weight BFLOAT16 [n, k]
     * @param out BFLOAT16 or FLOAT32 [m, n], overwritten
     * @return {@code out}
     */
    public Tensor forward(Tensor x, Tensor weight, Tensor out) {
        return multiplied(false, x, weight, out) ? out : out.setLinear(x, weight);
    }

    /**
     * Rows times a weight: the gradient of {@link #forward}'s rows from that of its result.
     *
     * @param x BFLOAT16 [m, n]
     * @param weight BFLOAT16 [n, k]
     * @param out BFLOAT16 or FLOAT32 [m, k], overwritten
     * @return {@code out}
     */
    public Tensor backward(Tensor x, Tensor weight, Tensor out) {
        if (!multiplied(true, x, weight, out)) {
            try (Scope scope = Scope.open()) {
                out.setLinear(x, weight.transpose(0, 1));
            }
        }
        return out;
    }

    private boolean multiplied(boolean backward, Tensor x, Tensor weight, Tensor out) {
        int rows = Math.toIntExact(x.size(0));
        if (rows < LEAST_ROWS) {
            return false;
        }
        Shape shape = new Shape(backward, Math.toIntExact(weight.size(0)), Math.toIntExact(weight.size(1)), x.stride(0), out.stride(0),
                out.dtype());
        Question question = new Question(2 * Integer.highestOneBit(rows - 1), shape);
        try {
            Optional<Product> product = found.get(question);
            if (product == null) {
                product = Optional.of(
                        cublas.tune(rows, question.like, shape, x.address(), new long[] {weight.address()}, out.address()));
                found.put(question, product);
                choices.save();
            }
            if (product.isPresent()) {
                product.get().rows(rows);
                product.get().run(x.address(), weight.address(), out.address());
            }
            return product.isPresent();
        } catch (TandemException e) {
            LOG.log(System.Logger.Level.WARNING, "{0} rows and {1} are multiplied by libtorch: {2}", rows, shape, e.getMessage());
            Optional<Product> before = found.put(question, Optional.empty());
            if (before != null) {
                before.ifPresent(Product::close);
            }
            return false;
        }
    }

    @Override
    public void close() {
        found.values().forEach(product -> product.ifPresent(Product::close));
    }
}
