package dev.tandem.model;

/** Something went wrong while a chat template was rendered; the renderer adds the file and the line. */
final class TemplateFailure extends RuntimeException {
    private static final long serialVersionUID = 1L;

    TemplateFailure(String problem) {
        super(problem, null, false, false);
    }
}
