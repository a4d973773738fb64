import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.DType;
import dev.tandem.model.ModelFormatException;
import dev.tandem.training.TrainingSequence;
import picocli.CommandLine;
import picocli.CommandLine.Option;

// Prints the log-probability of each token of a sequence after the first, from the forward pass that training uses.
//
//     java @target/java.args samples/Score.java --model DIR --ids 1,2,3 --json

@Option(names = "--model", required = true, paramLabel = "DIR", description = "a Hugging Face folder")
Path model;

@Option(names = "--ids", required = true, paramLabel = "1,2,3", description = "token ids of a sequence; repeatable")
List<String> sequences;

@Option(names = "--dtype", description = "of the weights in memory: float32 (default) or bfloat16")
String dtype = "float32";

@Option(names = "--json", description = "print one JSON object a line and nothing else")
boolean json;

@Option(names = "--help", usageHelp = true, description = "print this")
boolean help;

void main(String[] args) {
    CommandLine command = new CommandLine(this).setCommandName("Score");
    try {
        command.parseArgs(args);
        if (help) {
            command.usage(System.out);
        } else {
            run();
        }
    } catch (CommandLine.ParameterException | IllegalArgumentException | ModelFormatException e) {
        System.err.println("Score: " + e.getMessage());
        System.exit(2);
    }
}

void run() {
    List<int[]> tokens = sequences.stream().map(this::tokenIds).toList();
    try (HybridEngine engine = HybridEngine.open(model, EngineOptions.defaults().dtype(dtype(dtype)))) {
        float[][] logprobs = engine.logprobs(tokens.stream().map(ids -> TrainingSequence.of(ids, 1, 1)).toList(), 1);
        for (int i = 0; i < logprobs.length; i++) {
            int[] ids = tokens.get(i);
            float[] scores = logprobs[i];
            if (json) {
                JsonArray array = new JsonArray();
                IntStream.range(1, ids.length).forEach(at -> array.add(scores[at]));
                JsonObject object = new JsonObject();
                object.add("logprobs", array);
                IO.println(object);
            } else {
                IntStream.range(1, ids.length).forEach(at -> IO.println("%8d %10.4f  %s".formatted(
                        ids[at], scores[at], engine.tokenizer().decode(ids, at, at + 1, false))));
                double sum = IntStream.range(1, ids.length).mapToDouble(at -> scores[at]).sum();
                IO.println("%8s %10.4f%n".formatted("mean", sum / (ids.length - 1)));
            }
        }
    }
}

int[] tokenIds(String list) {
    try {
        return Arrays.stream(list.split(",", -1)).map(String::strip).mapToInt(Integer::parseInt).toArray();
    } catch (NumberFormatException e) {
        throw new IllegalArgumentException("--ids expects token ids with commas between them, found \"" + list + "\"");
    }
}

DType dtype(String name) {
    return switch (name) {
        case "float32" -> DType.FLOAT32;
        case "bfloat16" -> DType.BFLOAT16;
        default -> throw new IllegalArgumentException("--dtype is float32 or bfloat16, found \"" + name + "\"");
    };
}
