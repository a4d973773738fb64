package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.KernelModule;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.Tensor;
import dev.tandem.model.Activation;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Norm;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.TinyModels;
import java.util.Random;
import org.jspecify.annotations.Nullable;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;
import org.junit.jupiter.params.provider.ValueSource;

/** The elementwise work of a layer. Where libtorch's operations would store a result, the expectation is rounded, too. */
@Gpu
class CudaLayerTest extends KernelTest {
    private static final double ROUNDING_ONCE = 4e-3;
    private static final double ROUNDING = 1e-2;
    static final double EPSILON = 1e-5;
    /** Rows of outputs beyond those that count. */
    private static final int PADDING = 5;

    private static final int[] ROWS = {3, 515};
    private static final int[] WIDTHS = {576, 4096};

    /** Four shapes that have all head sizes, both norms and all activations between them. */
    static ModelConfig config(int headDim) {
        String sizes = "\"num_hidden_layers\":3,\"vocab_size\":1000,\"max_position_embeddings\":512,";
        return TinyModels.of(switch (headDim) {
            case 64 -> "{\"model_type\":\"opt\"," + sizes + "\"hidden_size\":768,\"num_attention_heads\":12,\"ffn_dim\":1024}";
            case 96 -> "{\"model_type\":\"opt\"," + sizes + "\"hidden_size\":384,\"num_attention_heads\":4,\"ffn_dim\":1024,"
                    + "\"activation_function\":\"gelu\"}";
            case 128 -> "{\"model_type\":\"llama\"," + sizes + "\"hidden_size\":1024,\"num_attention_heads\":14,"
                    + "\"num_key_value_heads\":2,\"head_dim\":128,\"intermediate_size\":1536}";
            default -> "{\"model_type\":\"llama\"," + sizes + "\"hidden_size\":1024,\"num_attention_heads\":9,"
                    + "\"num_key_value_heads\":3,\"head_dim\":256,\"intermediate_size\":1536,\"hidden_act\":\"gelu_pytorch_tanh\"}";
        });
    }

    /** So that both sizes of pages occur, and each shape is compiled once. */
    static GeneratorOptions options(ModelConfig config) {
        return GeneratorOptions.defaults().blockSize(config.headDim() % 128 == 0 ? 16 : 64);
    }

    private KernelModule module(ModelConfig config) {
        return load(config, options(config), "layer.cu").getFirst();
    }

    private static Tensor withPadding(Tensor rows) {
        long[] shape = rows.shape();
        shape[0] = PADDING;
        return Tensor.concatenate(0, rows, poison(rows.dtype(), shape));
    }

    /** Tokens that the host does not know yet are named by the pair that samples them. */
    @Test
    void resolvesTokens() {
        KernelModule module = load(config(128), GeneratorOptions.defaults(), "step.cu").getFirst();
        Tensor tokens = ints(7, -1, -3, 5, -2);
        Tensor last = ints(100, 200, 300);
        module.kernel("resolveTokens").launch(CUDA, Grid.of(1, 256), tokens.address(), last.address(), ints(4).address());
        assertSame("tokens", tokens, ints(7, 100, 300, 5, -2));
    }

    @ParameterizedTest(name = "learned positions {0}")
    @ValueSource(booleans = {false, true})
    void embeds(boolean learned) {
        KernelModule module = module(config(128));
        Random random = new Random(1);
        for (int width : WIDTHS) {
            Tensor table = normal(1, 1000, width);
            Tensor positionTable = normal(1, 514, width);
            for (int rows : ROWS) {
                int all = rows + PADDING;
                Tensor tokens = ints(random.ints(all, 0, 1000).toArray());
                Tensor positions = ints(random.ints(all, 0, 512).toArray());
                Tensor out = poison(DType.BFLOAT16, all, width);
                module.kernel("embed").launch(CUDA, CudaDecoder.rowGrid(all, width), tokens.address(), positions.address(),
                        table.address(), learned ? positionTable.address() : 0L, 2, out.address(), width, ints(rows).address());
                Tensor expected = table.indexSelect(0, tokens.narrow(0, 0, rows).to(DType.INT64));
                if (learned) {
                    Tensor places = positions.narrow(0, 0, rows).to(DType.INT64).add(2L);
                    expected = rounded(exact(expected).add(exact(positionTable.indexSelect(0, places))));
                }
                compare("embedding, " + rows + " x " + width + ", learned positions " + learned, out, withPadding(expected), 0);
            }
        }
    }

    private static Tensor mean(Tensor x) {
        return x.sum(-1).mul(1.0 / x.size(-1)).unsqueeze(-1);
    }

    static Tensor norm(Tensor x, Norm kind, Tensor weight, @Nullable Tensor bias) {
        Tensor centred = kind == Norm.LAYER ? x.sub(mean(x)) : x;
        Tensor normed = centred.div(mean(centred.square()).add(EPSILON).sqrt()).mul(exact(weight));
        return bias == null ? normed : normed.add(exact(bias));
    }

    @ParameterizedTest
    @EnumSource
    void addsAndNormalises(Norm kind) {
        ModelConfig config = config(kind == Norm.LAYER ? 64 : 128);
        KernelModule module = module(config);
        for (int width : WIDTHS) {
            Tensor weight = normal(1, width);
            Tensor bias = kind == Norm.LAYER ? normal(1, width) : null;
            for (int rows : ROWS) {
                for (int inputs = 1; inputs <= 3; inputs++) {
                    int all = rows + PADDING;
                    Tensor residual = normal(3, all, width).addInPlace(0.5);
                    Tensor addend = inputs > 1 ? normal(1, all, width) : null;
                    Tensor addendBias = inputs > 2 ? normal(1, width) : null;
                    Tensor change = addend == null || addendBias == null ? addend : addend.add(addendBias);
                    Tensor sum = change == null ? residual.copy() : residual.add(change);
                    Tensor expected = norm(exact(sum), kind, weight, bias);
                    String what = " norm " + kind + ", " + rows + " x " + width + ", inputs " + inputs;

                    int[] index = {0, rows - 1, -1, 1, 0};
                    Tensor rowIndex = ints(index);
                    Tensor gathered = poison(DType.BFLOAT16, index.length, width);
                    Tensor before = residual.copy();
                    module.kernel("gatherNorm").launch(CUDA, CudaDecoder.rowGrid(index.length, width), residual.address(),
                            address(addend), address(addendBias), weight.address(), address(bias), gathered.address(), width,
                            (float) EPSILON, rowIndex.address(), ints(4).address());
                    Tensor nothing = poison(DType.FLOAT64, 1, width);
                    compare("gathered" + what, gathered, Tensor.concatenate(0, expected.narrow(0, 0, 1),
                            expected.narrow(0, rows - 1, 1), nothing, expected.narrow(0, 1, 1), nothing), ROUNDING_ONCE);
                    assertSame("residual of the gathered" + what, residual, before);

                    Tensor out = poison(DType.BFLOAT16, all, width);
                    module.kernel("residualNorm").launch(CUDA, CudaDecoder.rowGrid(all, width), residual.address(), address(addend),
                            address(addendBias), weight.address(), address(bias), out.address(), width, (float) EPSILON,
                            ints(rows).address());
                    compare("residual" + what, out, withPadding(expected.narrow(0, 0, rows)), ROUNDING_ONCE);
                    assertSame("residual of the" + what, residual,
                            Tensor.concatenate(0, sum.narrow(0, 0, rows), before.narrow(0, rows, PADDING)));
                }
            }
        }
    }

    private static Tensor activation(Tensor x, Activation activation) {
        return switch (activation) {
            case SILU -> x.silu();
            case RELU -> x.relu();
            case GELU -> x.gelu(false);
            case GELU_TANH -> x.gelu(true);
        };
    }

    @ParameterizedTest
    @EnumSource
    void activates(Activation activation) {
        ModelConfig config = config(switch (activation) {
            case SILU -> 128;
            case RELU -> 64;
            case GELU -> 96;
            case GELU_TANH -> 256;
        });
        KernelModule module = module(config);
        for (int width : new int[] {576, 4864}) {
            int parts = config.gatedMlp() ? 2 : 1;
            for (int rows : new int[] {1, 257}) {
                for (boolean biased : new boolean[] {false, true}) {
                    Tensor in = normal(3, rows + PADDING, (long) parts * width);
                    in.narrow(0, 0, 1).narrow(1, 0, 3).copyInPlace(Tensor.of(CUDA, 0f, -100f, 100f).unsqueeze(0));
                    Tensor bias = biased ? normal(1, (long) parts * width) : null;
                    Tensor out = poison(DType.BFLOAT16, rows + PADDING, width);
                    Grid grid = CudaDecoder.activateGrid(rows + PADDING, width);
                    module.kernel("activate").launch(CUDA, grid, in.address(), address(bias), out.address(), width,
                            ints(rows).address());
                    Tensor x = exact((bias == null ? in : in.add(bias)).narrow(0, 0, rows));
                    Tensor expected = activation(x.narrow(1, 0, width), activation);
                    expected = parts == 1 ? expected : rounded(expected).mul(x.narrow(1, width, width));
                    // Relative to each element, so that the large ones do not hide the small ones.
                    expected = withPadding(expected);
                    Tensor unit = expected.abs().add(0.01);
                    compare(activation + ", " + rows + " x " + width + ", bias " + biased, exact(out).div(unit), expected.div(unit),
                            ROUNDING);
                }
            }
        }
    }
}
