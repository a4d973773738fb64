package dev.tandem.device;

import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import org.bytedeco.pytorch.Dispatcher;
import org.bytedeco.pytorch.IValue;
import org.bytedeco.pytorch.IValueVector;
import org.bytedeco.pytorch.OperatorHandle;
import org.jspecify.annotations.Nullable;

/**
 * An operation of libtorch that has no method here, called by its name through libtorch's dispatcher: the parts of attention and of
 * activations that automatic differentiation uses, for instance. Thread-safe.
 */
public final class Operator {
    private static final Map<String, Operator> KNOWN = new ConcurrentHashMap<>();

    private final String name;
    private final OperatorHandle handle;

    private Operator(String name) {
        this.name = name;
        Natives.load();
        OperatorHandle found = Dispatcher.singleton().findSchemaOrThrow(name, "");
        found.retainReference(); // outlives every scope
        handle = found;
    }

    /** {@return the operation of a name such as {@code aten::silu_backward}} */
    public static Operator named(String name) {
        return KNOWN.computeIfAbsent(name, Operator::new);
    }

    /**
     * Calls the operation.
     *
     * @param arguments all that its schema lists, in order: Tensor, Long, Double, Boolean, String, or null for an optional one that is not given
     * @return its results that are tensors, for the innermost scope
     * @throws IllegalArgumentException with libtorch's words when it refuses the arguments
     */
    public List<Tensor> call(@Nullable Object... arguments) {
        List<Tensor> results = new ArrayList<>();
        try (IValueVector stack = new IValueVector()) {
            for (Object argument : arguments) {
                try (IValue value = value(argument)) {
                    stack.push_back(value);
                }
            }
            try {
                handle.callBoxed(stack);
            } catch (RuntimeException e) {
                throw Tensor.refused(e);
            }
            for (long i = 0; i < stack.size(); i++) {
                IValue value = stack.get(i);
                if (value.isTensor()) {
                    // A handle of its own: the stack's goes with it.
                    results.add(new Tensor(new org.bytedeco.pytorch.Tensor(value.toTensor())));
                }
            }
        }
        return results;
    }

    private IValue value(@Nullable Object argument) {
        return switch (argument) {
            case null -> new IValue();
            case Tensor x -> new IValue(x.nativeTensor());
            case Long x -> new IValue((long) x);
            case Double x -> new IValue((double) x);
            case Boolean x -> new IValue((boolean) x);
            case String x -> new IValue(x);
            default -> throw new IllegalArgumentException(name + ": an argument is a " + argument.getClass());
        };
    }
}
