package dev.tandem.generation;

/** Why a completion ended. */
public sealed interface Finish {

    /** {@return a short lower-case name, as it appears in logs and JSON} */
    String label();

    /** The model sampled one of its end-of-sequence tokens, which is the completion's last token. */
    record Eos() implements Finish {
        @Override
        public String label() {
            return "eos";
        }
    }

    /**
     * A stop token of the request was sampled; it is the completion's last token.
     *
     * @param tokenId the token
     */
    record StopToken(int tokenId) implements Finish {
        @Override
        public String label() {
            return "stop";
        }
    }

    /**
     * A stop string of the request appeared; the completion's text is cut before it.
     *
     * @param text the stop string
     */
    record StopString(String text) implements Finish {
        @Override
        public String label() {
            return "stop";
        }
    }

    /** {@link SamplingParams#maxTokens()} tokens were generated. */
    record Length() implements Finish {
        @Override
        public String label() {
            return "length";
        }
    }

    /** Prompt and completion fill the model's context. */
    record ContextLength() implements Finish {
        @Override
        public String label() {
            return "context";
        }
    }

    /** The KV pool became too small for this request although no other request was left in it. */
    record KvCapacity() implements Finish {
        @Override
        public String label() {
            return "kv-capacity";
        }
    }

    /** The caller gave the request up; the tokens so far are kept. */
    record Aborted() implements Finish {
        @Override
        public String label() {
            return "aborted";
        }
    }

    /** The model's logits for this request held NaN or positive infinity, or no token that can be sampled. */
    record NonFinite() implements Finish {
        @Override
        public String label() {
            return "non-finite";
        }
    }
}
