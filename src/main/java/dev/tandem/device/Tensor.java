package dev.tandem.device;

import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.util.Arrays;
import java.util.List;
import org.bytedeco.javacpp.BytePointer;
import org.bytedeco.javacpp.Pointer;
import org.bytedeco.pytorch.BoolOptional;
import org.bytedeco.pytorch.DoubleOptional;
import org.bytedeco.pytorch.Generator;
import org.bytedeco.pytorch.GeneratorOptional;
import org.bytedeco.pytorch.LongOptional;
import org.bytedeco.pytorch.MemoryFormatOptional;
import org.bytedeco.pytorch.Scalar;
import org.bytedeco.pytorch.ScalarOptional;
import org.bytedeco.pytorch.ScalarTypeOptional;
import org.bytedeco.pytorch.TensorArrayRefOptional;
import org.bytedeco.pytorch.TensorOptional;
import org.bytedeco.pytorch.TensorOptions;
import org.bytedeco.pytorch.TensorVector;
import org.bytedeco.pytorch.global.torch;
import org.bytedeco.pytorch.global.torch.ScalarType;
import org.jspecify.annotations.Nullable;

/**
 * An n-dimensional array on a device, with the operations that Tandem and a loss written by a user need. It is a handle to a
 * libtorch tensor; views share memory with what they were taken from, and operations are differentiable where gradients are
 * enabled.
 *
 * <p>A tensor belongs to the innermost {@link Scope} of the thread that made it, and otherwise to whoever made it, who closes
 * it. Confined to one thread at a time. Methods that end in {@code InPlace} change this tensor and return it. Broadcasting
 * follows libtorch; a shape that does not fit is an {@link IllegalArgumentException}.
 */
public final class Tensor implements AutoCloseable {
    private static final int MAX_MESSAGE = 400;

    private final org.bytedeco.pytorch.Tensor t;

    Tensor(org.bytedeco.pytorch.Tensor t) {
        this.t = t;
    }

    /** {@return the libtorch tensor behind this handle, for code that must call libtorch itself; it stays this handle's} */
    public org.bytedeco.pytorch.Tensor nativeTensor() {
        return t;
    }

    // ---- making tensors -------------------------------------------------------------------------------------------------

    /** {@return a tensor whose content is undefined} */
    public static Tensor empty(Device device, DType dtype, long... shape) {
        return new Tensor(torch.empty(shape, options(device, dtype), NONE.memoryFormat));
    }

    /** {@return a tensor of zeros} */
    public static Tensor zeros(Device device, DType dtype, long... shape) {
        return new Tensor(torch.zeros(shape, options(device, dtype)));
    }

    /** {@return a tensor filled with one value} */
    public static Tensor full(Device device, DType dtype, double value, long... shape) {
        Tensor made = empty(device, dtype, shape);
        made.t.fill_(new Scalar(value));
        return made;
    }

    /** {@return the integers 0 … n-1, INT64} */
    public static Tensor range(Device device, long n) {
        return new Tensor(torch.arange(new Scalar(n), options(device, DType.INT64)));
    }

    /** {@return a FLOAT32 copy of the values, shape [n]} */
    public static Tensor of(Device device, float... values) {
        Tensor host = empty(Device.cpu(), DType.FLOAT32, values.length);
        MemorySegment.copy(values, 0, host.memory(), ValueLayout.JAVA_FLOAT, 0, values.length);
        return host.on(device);
    }

    /** {@return a FLOAT64 copy of the values, shape [n]} */
    public static Tensor of(Device device, double... values) {
        Tensor host = empty(Device.cpu(), DType.FLOAT64, values.length);
        MemorySegment.copy(values, 0, host.memory(), ValueLayout.JAVA_DOUBLE, 0, values.length);
        return host.on(device);
    }

    /** {@return an INT64 copy of the values, shape [n]} */
    public static Tensor of(Device device, long... values) {
        Tensor host = empty(Device.cpu(), DType.INT64, values.length);
        MemorySegment.copy(values, 0, host.memory(), ValueLayout.JAVA_LONG, 0, values.length);
        return host.on(device);
    }

    /** {@return an INT64 copy of the values, shape [n]} */
    public static Tensor of(Device device, int... values) {
        return of(device, Arrays.stream(values).asLongStream().toArray());
    }

    /**
     * Wraps host memory without copying it.
     *
     * @param memory native memory that outlives the tensor and everything viewed from it
     * @return a CPU tensor over the same bytes
     */
    public static Tensor wrap(MemorySegment memory, DType dtype, long... shape) {
        if (!memory.isNative()) {
            throw new IllegalArgumentException("only native memory can be wrapped");
        }
        long bytes = dtype.bytes();
        for (long d : shape) {
            bytes = Math.multiplyExact(bytes, d);
        }
        if (bytes > memory.byteSize()) {
            throw new IllegalArgumentException("shape " + Arrays.toString(shape) + " of " + dtype + " needs " + bytes
                    + " bytes, the memory has " + memory.byteSize());
        }
        return at(Device.cpu(), memory.address(), dtype, shape);
    }

    /**
     * Makes a tensor over memory of a device without copying it, and without checking that it is there.
     *
     * @param address of memory that outlives the tensor and everything viewed from it; it may be reserved and not backed yet
     */
    static Tensor at(Device device, long address, DType dtype, long... shape) {
        Natives.load();
        try (BytePointer at = new BytePointer(new Address(address))) {
            return new Tensor(torch.from_blob(at, shape, options(device, dtype)));
        }
    }

    /** A pointer to memory that somebody else owns. */
    private static final class Address extends Pointer {
        Address(long address) {
            super((Pointer) null);
            this.address = address;
        }
    }

    // ---- what it is -----------------------------------------------------------------------------------------------------

    /** {@return the shape} */
    public long[] shape() {
        return t.shape();
    }

    /** {@return the size of one dimension; negative numbers count from the last} */
    public long size(int dimension) {
        return t.size(dimension);
    }

    /** {@return elements from one index of a dimension to the next} */
    public long stride(int dimension) {
        return t.stride(dimension);
    }

    /** {@return the number of elements} */
    public long elements() {
        return t.numel();
    }

    /** {@return the element type} */
    public DType dtype() {
        return switch (t.scalar_type().intern()) {
            case Float -> DType.FLOAT32;
            case BFloat16 -> DType.BFLOAT16;
            case Half -> DType.FLOAT16;
            case Double -> DType.FLOAT64;
            case Long -> DType.INT64;
            case Int -> DType.INT32;
            case Bool -> DType.BOOL;
            default -> throw new IllegalStateException("element type " + t.scalar_type() + " is not used by Tandem");
        };
    }

    /** {@return where the elements are; a CPU tensor always says {@code cpu:0}} */
    public Device device() {
        return t.is_cuda() ? Device.cuda(t.device().index()) : Device.cpu();
    }

    /** {@return the address of the first element} */
    public long address() {
        return t.data_ptr().address();
    }

    /** {@return the bytes of a contiguous CPU tensor, valid while the tensor is} */
    public MemorySegment memory() {
        if (!t.is_contiguous() || t.is_cuda()) {
            throw new IllegalStateException("only a contiguous CPU tensor has addressable memory");
        }
        return MemorySegment.ofAddress(address()).reinterpret(t.numel() * dtype().bytes());
    }

    /** {@return a tensor on that device: this one if it is there already} */
    public Tensor on(Device device) {
        return device.isCpu() && !t.is_cuda()
                ? this
                : new Tensor(t.to(torchDevice(device), t.scalar_type(), false, false, NONE.memoryFormat));
    }

    /** {@return the values as floats, in row-major order} */
    public float[] toFloats() {
        try (Scope scope = Scope.open()) {
            Tensor host = to(DType.FLOAT32).on(Device.cpu()).contiguous();
            return host.memory().toArray(ValueLayout.JAVA_FLOAT);
        }
    }

    /** {@return the values as doubles, in row-major order} */
    public double[] toDoubles() {
        try (Scope scope = Scope.open()) {
            return to(DType.FLOAT64).on(Device.cpu()).contiguous().memory().toArray(ValueLayout.JAVA_DOUBLE);
        }
    }

    /** {@return the one value of a tensor with one element} */
    public double item() {
        return t.item_double();
    }

    // ---- views ----------------------------------------------------------------------------------------------------------

    /** {@return the same elements in another shape, as a view where possible} */
    public Tensor reshape(long... shape) {
        return new Tensor(t.reshape(shape));
    }

    /** {@return the elements {@code start … start+length-1} of a dimension, a view} */
    public Tensor narrow(int dimension, long start, long length) {
        return new Tensor(t.narrow(dimension, start, length));
    }

    /** {@return one index of a dimension, which disappears, a view} */
    public Tensor select(int dimension, long index) {
        return new Tensor(t.select(dimension, index));
    }

    /** {@return two dimensions exchanged, a view} */
    public Tensor transpose(int a, int b) {
        return new Tensor(t.transpose(a, b));
    }

    /** {@return a dimension of size one inserted, a view} */
    public Tensor unsqueeze(int dimension) {
        return new Tensor(t.unsqueeze(dimension));
    }

    /** {@return dimensions of size one repeated without copying, a view; -1 leaves a dimension alone} */
    public Tensor expand(long... shape) {
        return new Tensor(t.expand(shape));
    }

    /** {@return any view over the storage that begins where this tensor begins; sizes and strides in elements} */
    public Tensor strided(long[] shape, long[] strides, long offset) {
        try (LongOptional at = new LongOptional(t.storage_offset() + offset)) {
            return new Tensor(t.as_strided(shape, strides, at));
        }
    }

    /** {@return the elements of a dimension in the opposite order, a copy} */
    public Tensor flip(int dimension) {
        return new Tensor(t.flip(dimension));
    }

    /** {@return this tensor if its elements lie in row-major order, else a copy that does} */
    public Tensor contiguous() {
        return t.is_contiguous() ? this : new Tensor(t.contiguous());
    }

    /** {@return the tensor cut along a dimension into pieces of these sizes, views} */
    public List<Tensor> split(int dimension, long... sizes) {
        try (TensorVector pieces = t.split_with_sizes(sizes, dimension)) {
            return java.util.stream.LongStream.range(0, pieces.size())
                    .mapToObj(i -> new Tensor(new org.bytedeco.pytorch.Tensor(pieces.get(i))))
                    .toList();
        }
    }

    /** {@return the same elements, unknown to differentiation, a view} */
    public Tensor detach() {
        return new Tensor(t.detach());
    }

    /** {@return the tensors joined along a dimension} */
    public static Tensor concatenate(int dimension, List<Tensor> tensors) {
        return concatenate(dimension, tensors.toArray(Tensor[]::new));
    }

    /** {@return the tensors joined along a dimension} */
    public static Tensor concatenate(int dimension, Tensor... tensors) {
        try (TensorVector vector = vector(tensors)) {
            return new Tensor(torch.cat(vector, dimension));
        }
    }

    static TensorVector vector(Tensor... tensors) {
        var pointers = new org.bytedeco.pytorch.Tensor[tensors.length];
        for (int i = 0; i < tensors.length; i++) {
            pointers[i] = tensors[i].t;
        }
        return new TensorVector(pointers);
    }

    // ---- element by element ---------------------------------------------------------------------------------------------

    /** {@return the elements in another type; this tensor if it has it already} */
    public Tensor to(DType dtype) {
        return dtype() == dtype ? this : new Tensor(t.to(scalarType(dtype)));
    }

    /** {@return a copy} */
    public Tensor copy() {
        return new Tensor(t.clone());
    }

    /** {@return this + other} */
    public Tensor add(Tensor other) {
        return new Tensor(checked(() -> t.add(other.t)));
    }

    /** {@return this + value, of the same integer type} */
    public Tensor add(long value) {
        return new Tensor(t.add(new Scalar(value)));
    }

    /** {@return this + value} */
    public Tensor add(double value) {
        return new Tensor(t.add(new Scalar(value)));
    }

    /** {@return this - other} */
    public Tensor sub(Tensor other) {
        return new Tensor(checked(() -> t.sub(other.t)));
    }

    /** {@return this × other} */
    public Tensor mul(Tensor other) {
        return new Tensor(checked(() -> t.mul(other.t)));
    }

    /** {@return this × value} */
    public Tensor mul(double value) {
        return new Tensor(t.mul(new Scalar(value)));
    }

    /** {@return this ÷ other} */
    public Tensor div(Tensor other) {
        return new Tensor(checked(() -> t.div(other.t)));
    }

    /** {@return -this} */
    public Tensor neg() {
        return new Tensor(t.neg());
    }

    /** {@return the cosine of each element} */
    public Tensor cos() {
        return new Tensor(t.cos());
    }

    /** {@return the sine of each element} */
    public Tensor sin() {
        return new Tensor(t.sin());
    }

    /** {@return e to the power of this} */
    public Tensor exp() {
        return new Tensor(t.exp());
    }

    /** {@return the natural logarithm} */
    public Tensor log() {
        return new Tensor(t.log());
    }

    /** {@return the absolute value} */
    public Tensor abs() {
        return new Tensor(t.abs());
    }

    /** {@return the square} */
    public Tensor square() {
        return new Tensor(t.square());
    }

    /** {@return values below {@code low} or above {@code high} replaced by the bound, whose gradient is zero} */
    public Tensor clamp(double low, double high) {
        try (Scalar l = new Scalar(low);
                Scalar h = new Scalar(high);
                ScalarOptional lo = new ScalarOptional(l);
                ScalarOptional hi = new ScalarOptional(h)) {
            return new Tensor(t.clamp(lo, hi));
        }
    }

    /** {@return the smaller of each pair} */
    public Tensor minimum(Tensor other) {
        return new Tensor(checked(() -> torch.minimum(t, other.t)));
    }

    /** {@return the larger of each pair} */
    public Tensor maximum(Tensor other) {
        return new Tensor(checked(() -> torch.maximum(t, other.t)));
    }

    /** {@return BOOL: where this is less than the value} */
    public Tensor lessThan(double value) {
        return new Tensor(t.lt(new Scalar(value)));
    }

    /** {@return BOOL: where this is greater than the value} */
    public Tensor greaterThan(double value) {
        return new Tensor(t.gt(new Scalar(value)));
    }

    /** {@return BOOL: where the elements are equal} */
    public Tensor equalTo(Tensor other) {
        return new Tensor(checked(() -> t.eq(other.t)));
    }

    /** {@return elements of {@code yes} where this BOOL tensor is true, of {@code no} elsewhere} */
    public Tensor choose(Tensor yes, Tensor no) {
        return new Tensor(checked(() -> torch.where(t, yes.t, no.t)));
    }

    /** Adds the other tensor to this one. */
    public Tensor addInPlace(Tensor other) {
        t.add_(other.t);
        return this;
    }

    /** Adds {@code scale × a × b} to this tensor. */
    public Tensor addProductInPlace(Tensor a, Tensor b, double scale) {
        try (Scalar s = new Scalar(scale)) {
            t.addcmul_(a.t, b.t, s);
        }
        return this;
    }

    /** Subtracts the other tensor from this one. */
    public Tensor subInPlace(Tensor other) {
        t.sub_(other.t);
        return this;
    }

    /** Multiplies this tensor by the other one. */
    public Tensor mulInPlace(Tensor other) {
        t.mul_(other.t);
        return this;
    }

    /** Multiplies this tensor by a number. */
    public Tensor mulInPlace(double value) {
        try (Scalar s = new Scalar(value)) {
            t.mul_(s);
        }
        return this;
    }

    /** Moves this tensor towards the target by a share of the way. */
    public Tensor lerpInPlace(Tensor target, double share) {
        try (Scalar s = new Scalar(share)) {
            t.lerp_(target.t, s);
        }
        return this;
    }

    /** Adds {@code scale × a ÷ b} to this tensor. */
    public Tensor addQuotientInPlace(Tensor a, Tensor b, double scale) {
        try (Scalar s = new Scalar(scale)) {
            t.addcdiv_(a.t, b.t, s);
        }
        return this;
    }

    /** Adds a number to this tensor. */
    public Tensor addInPlace(double value) {
        try (Scalar s = new Scalar(value)) {
            t.add_(s);
        }
        return this;
    }

    /** {@return the square root} */
    public Tensor sqrt() {
        return new Tensor(t.sqrt());
    }

    /** Sets this tensor to the square root of each element of another of its shape, and allocates nothing. */
    public Tensor setSqrt(Tensor other) {
        torch.sqrt_out(t, other.t);
        return this;
    }

    /** Replaces each element by e to its power. */
    public Tensor expInPlace() {
        t.exp_();
        return this;
    }

    /** Sets every element. */
    public Tensor fillInPlace(double value) {
        try (Scalar s = new Scalar(value)) {
            t.fill_(s);
        }
        return this;
    }

    /** Copies the other tensor's elements into this one, converting type and device. */
    public Tensor copyInPlace(Tensor other) {
        checked(() -> t.copy_(other.t));
        return this;
    }

    /** Fills with normally distributed values of this mean and standard deviation. CPU and CUDA draw different ones. */
    public Tensor normalInPlace(double mean, double deviation, RandomStream random) {
        try (GeneratorOptional source = t.is_cuda() ? random.onCuda() : new GeneratorOptional(random.generator())) {
            t.normal_(mean, deviation, source);
        }
        return this;
    }

    /** A seeded stream of native random numbers. */
    public static final class RandomStream implements AutoCloseable {
        private final Generator generator;
        private final long seed;
        private boolean seeded;

        /** @param seed the same seed gives the same numbers with the same libtorch */
        public RandomStream(long seed) {
            Natives.load();
            generator = torch.make_generator_cpu(seed);
            generator.retainReference();
            this.seed = seed;
        }

        Generator generator() {
            return generator;
        }

        /** libtorch's own generator of the device, seeded when it is first used. */
        GeneratorOptional onCuda() {
            if (!seeded) {
                seeded = true;
                torch.manual_seed(seed);
            }
            return new GeneratorOptional();
        }

        @Override
        public void close() {
            generator.close();
        }
    }

    // ---- reductions -----------------------------------------------------------------------------------------------------

    /** {@return the sum of all elements} */
    public Tensor sum() {
        return new Tensor(t.sum());
    }

    /** {@return sums along a dimension, which disappears} */
    public Tensor sum(int dimension) {
        return new Tensor(t.sum(new long[] {dimension}, false, NONE.scalarType));
    }

    /** {@return the mean of all elements} */
    public Tensor mean() {
        return new Tensor(t.mean());
    }

    /** {@return the largest element} */
    public Tensor max() {
        return new Tensor(t.max());
    }

    /** {@return log Σ exp along a dimension, which disappears} */
    public Tensor logSumExp(int dimension) {
        return new Tensor(t.logsumexp(new long[] {dimension}, false));
    }

    /** {@return softmax along a dimension} */
    public Tensor softmax(int dimension) {
        return new Tensor(torch.softmax(t, dimension));
    }

    /** {@return log-softmax along a dimension} */
    public Tensor logSoftmax(int dimension) {
        return new Tensor(torch.log_softmax(t, dimension));
    }

    /** {@return the sum of squares of all elements of a contiguous tensor, in pieces that are added up in double precision} */
    public double sumOfSquares() {
        double sum = 0;
        try (Scope scope = Scope.open()) {
            org.bytedeco.pytorch.Tensor flat = t.reshape(-1);
            long size = t.is_cuda() ? CUDA_PIECE : PIECE;
            for (long at = 0; at < t.numel(); at += size) {
                org.bytedeco.pytorch.Tensor piece = flat.narrow(0, at, Math.min(size, t.numel() - at));
                sum += piece.dot(piece).item_double();
            }
        }
        return sum;
    }

    private static final long PIECE = 1 << 16;
    private static final long CUDA_PIECE = 1 << 26;

    // ---- selecting ------------------------------------------------------------------------------------------------------

    /** {@return the rows (indices of a dimension) named by an INT64 or INT32 tensor} */
    public Tensor indexSelect(int dimension, Tensor index) {
        return new Tensor(checked(() -> t.index_select(dimension, index.t)));
    }

    /** {@return one element per position along a dimension, named by an INT64 tensor of the result's shape} */
    public Tensor gather(int dimension, Tensor index) {
        return new Tensor(checked(() -> t.gather(dimension, index.t)));
    }

    /** Adds the source's rows to the rows of this tensor that an INT64 tensor names; a row may be named repeatedly. */
    public Tensor indexAddInPlace(int dimension, Tensor index, Tensor source) {
        checked(() -> t.index_add_(dimension, index.t, source.t));
        return this;
    }

    /** Adds the source's elements to the positions along a dimension that an INT64 tensor names. */
    public Tensor scatterAddInPlace(int dimension, Tensor index, Tensor source) {
        checked(() -> t.scatter_add_(dimension, index.t, source.t));
        return this;
    }

    /** Copies {@code values} to the places {@code [first[i], second[i]]} of the first two dimensions. */
    public Tensor indexPutInPlace(Tensor first, Tensor second, Tensor values) {
        try (org.bytedeco.pytorch.TensorOptionalList places = new org.bytedeco.pytorch.TensorOptionalList()) {
            places.push_back(new TensorOptional(first.t));
            places.push_back(new TensorOptional(second.t));
            t.index_put_(places, values.t);
        }
        return this;
    }

    // ---- neural network operations --------------------------------------------------------------------------------------

    /** {@return this [.., k] times the transpose of {@code weight} [n, k], plus {@code bias} [n] if there is one} */
    public Tensor linear(Tensor weight, @Nullable Tensor bias) {
        if (SkinnyMatmul.applies(t, weight.t)) {
            Tensor product = SkinnyMatmul.multiply(this, weight);
            return bias == null ? product : product.addInPlace(bias);
        }
        if (bias == null) {
            return new Tensor(checked(() -> torch.linear(t, weight.t)));
        }
        return new Tensor(checked(() -> torch.linear(t, weight.t, bias.t)));
    }

    /**
     * {@return this [n, k] times the transpose of {@code weight} [m, k], in FLOAT32} On a GPU the products of BFLOAT16 factors are not
     * rounded in between; on the CPU they are.
     */
    public Tensor linearInFloat(Tensor weight) {
        return t.is_cuda() && dtype() == DType.BFLOAT16
                ? new Tensor(checked(() -> torch.mm(t, weight.t.t(), ScalarType.Float)))
                : linear(weight, null).to(DType.FLOAT32);
    }

    /**
     * Writes the product of {@code x} [.., k] and the transpose of {@code weight} [n, k] into this tensor, and allocates nothing. A
     * FLOAT32 result of BFLOAT16 factors is not rounded in between (on a GPU).
     */
    public Tensor setLinear(Tensor x, Tensor weight) {
        try (Scope scope = Scope.open()) {
            Tensor transposed = weight.transpose(0, 1);
            checked(() -> dtype() == x.dtype()
                    ? torch.mm_out(t, x.t, transposed.t)
                    : torch.mm_out(t, x.t, transposed.t, scalarType(dtype())));
        }
        return this;
    }

    /** {@return the matrix product} */
    public Tensor matmul(Tensor other) {
        return new Tensor(checked(() -> torch.matmul(t, other.t)));
    }

    /**
     * Adds the matrix product of {@code a} [n, k] and {@code b} [k, m] to this [n, m]. To a FLOAT32 matrix, products of BFLOAT16 factors
     * are added without being rounded in between on a GPU.
     */
    public Tensor addMatmulInPlace(Tensor a, Tensor b) {
        if (dtype() == a.dtype()) {
            checked(() -> t.addmm_(a.t, b.t));
        } else if (t.is_cuda()) {
            checked(() -> torch.addmm_out(t, t, a.t, b.t, scalarType(dtype())));
        } else {
            try (Scope scope = Scope.open()) {
                addInPlace(a.matmul(b).to(dtype()));
            }
        }
        return this;
    }

    /** {@return root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019)} */
    public Tensor rmsNorm(Tensor weight, double epsilon) {
        try (TensorOptional w = new TensorOptional(weight.t);
                DoubleOptional e = new DoubleOptional(epsilon)) {
            return new Tensor(torch.rms_norm(t, new long[] {size(-1)}, w, e));
        }
    }

    /** {@return layer normalisation over the last dimension (Ba et al. 2016), without scale and shift where null} */
    public Tensor layerNorm(@Nullable Tensor weight, @Nullable Tensor bias, double epsilon) {
        try (TensorOptional w = weight == null ? new TensorOptional() : new TensorOptional(weight.t);
                TensorOptional b = bias == null ? new TensorOptional() : new TensorOptional(bias.t)) {
            return new Tensor(torch.layer_norm(t, new long[] {size(-1)}, w, b, epsilon, true));
        }
    }

    /** {@return x × sigmoid(x)} */
    public Tensor silu() {
        return new Tensor(torch.silu(t));
    }

    /** Replaces each element x by x × sigmoid(x). */
    public Tensor siluInPlace() {
        torch.silu_(t);
        return this;
    }

    /** {@return max(x, 0)} */
    public Tensor relu() {
        return new Tensor(torch.relu(t));
    }

    /** {@return x × Φ(x), by the error function or by the tanh approximation (Hendrycks and Gimpel 2016)} */
    public Tensor gelu(boolean tanh) {
        return new Tensor(torch.gelu(t, tanh ? "tanh" : "none"));
    }

    /**
     * Scaled dot-product attention.
     *
     * @param key [batch, heads, keys, size]; this tensor is the query, [batch, heads, queries, size]
     * @param value [batch, heads, keys, size]
     * @param mask added to the scores, broadcast to [batch, heads, queries, keys], or null
     * @param causal whether query i sees keys 0 … i only; then there is no mask
     * @return [batch, heads, queries, size]
     */
    public Tensor attention(Tensor key, Tensor value, @Nullable Tensor mask, boolean causal, double scale) {
        try (TensorOptional m = mask == null ? new TensorOptional() : new TensorOptional(mask.t);
                DoubleOptional s = new DoubleOptional(scale)) {
            return new Tensor(torch.scaled_dot_product_attention(t, key.t, value.t, m, 0.0, causal, s, false));
        }
    }

    // ---- differentiation ------------------------------------------------------------------------------------------------

    /** {@return this tensor, made a leaf whose gradient is wanted} */
    public Tensor requireGradient() {
        t.requires_grad_(true);
        return this;
    }

    /** {@return whether this is a leaf whose gradient is wanted, or was computed from one with gradients enabled} */
    public boolean requiresGradient() {
        return t.requires_grad();
    }

    /** {@return the gradient that was accumulated for this leaf, or null if there is none} */
    public @Nullable Tensor gradient() {
        org.bytedeco.pytorch.Tensor grad = t.grad();
        return grad.defined() ? new Tensor(new org.bytedeco.pytorch.Tensor(grad)) : null;
    }

    /** Makes gradients of this leaf accumulate into the memory of {@code into}, which has its shape and type. */
    public Tensor accumulateInto(Tensor into) {
        try (org.bytedeco.pytorch.Tensor grad = t.mutable_grad()) {
            grad.put(into.t);
        }
        return this;
    }

    /** Differentiates this scalar with respect to the leaves it was computed from. */
    public void backward() {
        t.backward();
    }

    /** Propagates {@code gradient}, of this tensor's shape, to the leaves it was computed from. */
    public void backward(Tensor gradient) {
        try (BoolOptional retain = new BoolOptional(false);
                TensorArrayRefOptional inputs = new TensorArrayRefOptional()) {
            t.backward(gradient.t, retain, false, inputs);
        }
    }

    // ---- the rest -------------------------------------------------------------------------------------------------------

    /** Releases this handle; the memory goes when no view is left. */
    @Override
    public void close() {
        t.close();
    }

    /** {@return this handle, no longer bound to the scope it was made in: the caller closes it} */
    public Tensor keep() {
        t.retainReference();
        return this;
    }

    @Override
    public String toString() {
        return t.isNull() ? "Tensor[closed]" : "Tensor" + Arrays.toString(shape()) + " " + dtype();
    }

    /** Empty optionals that every call shares. */
    private static final class NONE {
        static final MemoryFormatOptional memoryFormat = new MemoryFormatOptional();
        static final ScalarTypeOptional scalarType = new ScalarTypeOptional();

        static {
            memoryFormat.retainReference();
            scalarType.retainReference();
        }
    }

    private static TensorOptions options(Device device, DType dtype) {
        Natives.load();
        return new TensorOptions(scalarType(dtype)).device(new org.bytedeco.pytorch.DeviceOptional(torchDevice(device)));
    }

    private static org.bytedeco.pytorch.Device torchDevice(Device device) {
        return device.isCpu()
                ? new org.bytedeco.pytorch.Device(torch.DeviceType.CPU)
                : new org.bytedeco.pytorch.Device(torch.DeviceType.CUDA, (byte) device.index());
    }

    static ScalarType scalarType(DType dtype) {
        return switch (dtype) {
            case FLOAT32 -> ScalarType.Float;
            case BFLOAT16 -> ScalarType.BFloat16;
            case FLOAT16 -> ScalarType.Half;
            case FLOAT64 -> ScalarType.Double;
            case INT64 -> ScalarType.Long;
            case INT32 -> ScalarType.Int;
            case BOOL -> ScalarType.Bool;
        };
    }

    private interface Native {
        org.bytedeco.pytorch.Tensor call();
    }

    /** libtorch's own message is sixteen lines of C++ frames; the first line names the shapes. */
    private static org.bytedeco.pytorch.Tensor checked(Native operation) {
        try {
            return operation.call();
        } catch (RuntimeException e) {
            throw refused(e);
        }
    }

    /** {@return what to throw when libtorch refuses arguments: its message without the stack that follows it} */
    static IllegalArgumentException refused(RuntimeException e) {
        String message = String.valueOf(e.getMessage());
        int end = message.indexOf("\nException raised from");
        String head = end < 0 ? message : message.substring(0, end);
        return new IllegalArgumentException(head.substring(0, Math.min(head.length(), MAX_MESSAGE)), e);
    }
}
