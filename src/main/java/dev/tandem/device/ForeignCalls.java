package dev.tandem.device;

/** What all calls through method handles of native functions share. */
final class ForeignCalls {
    private ForeignCalls() {}

    /** {@return what to throw for what a method handle threw: itself if it is unchecked} */
    static RuntimeException rethrown(Throwable e) {
        if (e instanceof RuntimeException r) {
            return r;
        }
        if (e instanceof Error error) {
            throw error;
        }
        return new IllegalStateException(e);
    }
}
