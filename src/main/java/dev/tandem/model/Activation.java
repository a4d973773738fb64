package dev.tandem.model;

import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** The non-linearity of a decoder's feed-forward block. */
public enum Activation {
    /** {@code x * sigmoid(x)}. */
    SILU("silu", "swish"),
    /** {@code x * Phi(x)}, with the exact error function. */
    GELU("gelu", "gelu_python"),
    /** GELU through its tanh approximation. */
    GELU_TANH("gelu_pytorch_tanh", "gelu_new"),
    /** {@code max(x, 0)}. */
    RELU("relu");

    @SuppressWarnings("ImmutableEnumChecker") // List.of
    private final List<String> names;

    Activation(String... names) {
        this.names = List.of(names);
    }

    /** {@return the name that config.json is given on saving} */
    String hubName() {
        return names.getFirst();
    }

    /** {@return the number by which Tandem's kernels know it: their macro ACTIVATION} */
    public int kernelNumber() {
        return switch (this) {
            case SILU -> 0;
            case RELU -> 1;
            case GELU -> 2;
            case GELU_TANH -> 3;
        };
    }

    /** {@return every name that config.json may use, with what it stands for} */
    static Map<String, Activation> byHubName() {
        Map<String, Activation> all = new LinkedHashMap<>();
        for (Activation activation : values()) {
            activation.names.forEach(name -> all.put(name, activation));
        }
        return all;
    }
}
