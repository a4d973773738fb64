/** Trains and generates with one copy of a language model's weights in one process. */
module dev.tandem {
    requires transitive org.jspecify;
    requires org.bytedeco.cuda;
    requires org.bytedeco.javacpp;
    requires org.bytedeco.openblas;
    requires org.bytedeco.pytorch;
    requires com.google.gson;
    requires ai.djl.tokenizers;
    requires commons.math3;
    requires java.logging;
    requires jdk.jfr;
    requires jdk.management;

    exports dev.tandem;
    exports dev.tandem.device;
    exports dev.tandem.generation;
    exports dev.tandem.model;
    exports dev.tandem.parallel;
    exports dev.tandem.rl;
    exports dev.tandem.training;
}
