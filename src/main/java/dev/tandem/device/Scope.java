package dev.tandem.device;

import org.bytedeco.javacpp.Pointer;
import org.bytedeco.javacpp.PointerScope;
import org.jspecify.annotations.Nullable;

/**
 * The lifetime of the tensors that a block of code makes: every {@link Tensor} created on this thread while the scope is the
 * innermost one is released when the scope closes, unless it was kept.
 *
 * <p>Scopes are confined to their thread and close in the reverse order of opening. They cost tens of nanoseconds.
 */
public final class Scope implements AutoCloseable {
    private final @Nullable PointerScope outer;
    private final PointerScope scope;

    private Scope() {
        Natives.load();
        outer = PointerScope.getInnerScope();
        scope = new PointerScope();
    }

    /** {@return a new innermost scope of this thread} */
    public static Scope open() {
        return new Scope();
    }

    /**
     * Moves a tensor to the scope around this one, or to nobody's when there is none; then the caller closes it.
     *
     * @return the same tensor
     */
    public Tensor escape(Tensor tensor) {
        Pointer pointer = tensor.nativeTensor();
        if (outer == null) {
            pointer.retainReference();
        } else {
            outer.attach(pointer);
        }
        return tensor;
    }

    @Override
    public void close() {
        scope.close();
    }
}
