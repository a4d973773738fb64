import com.google.gson.Gson;
import com.google.gson.JsonParseException;
import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.DType;
import dev.tandem.model.ChatMessage;
import dev.tandem.model.ChatTemplate;
import dev.tandem.model.ModelFormatException;
import dev.tandem.training.LearningRate;
import dev.tandem.training.TrainerOptions;
import dev.tandem.training.PendingStep;
import dev.tandem.training.TrainingSequence;
import picocli.CommandLine;
import picocli.CommandLine.Option;

// Supervised fine-tuning. Each line of the data is one of
//
//     {"text": "…"}                                                      every token is trained
//     {"prompt": "…", "completion": "…"}                                 the completion is trained
//     {"messages": [{"role": "user", "content": "…"}, …]}                the assistant's turns are trained
//
//     java @target/java.args samples/Sft.java --model DIR --data FILE.jsonl --epochs 3 --out DIR

@Option(names = "--model", required = true, paramLabel = "DIR", description = "a Hugging Face folder")
Path model;

@Option(names = "--data", required = true, paramLabel = "FILE", description = "JSON lines")
Path data;

@Option(names = "--out", paramLabel = "DIR", description = "where the trained model goes (default: nowhere)")
Path out;

@Option(names = "--epochs", description = "passes over the data (default: 1)")
int epochs = 1;

@Option(names = "--steps", description = "optimizer steps, instead of --epochs")
Integer steps;

@Option(names = "--batch-size", description = "sequences of a step (default: 8)")
int batchSize = 8;

@Option(names = "--lr", description = "highest learning rate (default: 1e-5)")
double lr = 1e-5;

@Option(names = "--schedule", description = "after the warm-up: constant (default), linear or cosine")
String schedule = "constant";

@Option(names = "--warmup", description = "steps until the highest rate (default: 0)")
int warmup;

@Option(names = "--dtype", description = "of the weights in memory: float32 (default) or bfloat16")
String dtype = "float32";

@Option(names = "--seed", description = "of the order of the data (default: 0)")
long seed;

@Option(names = "--help", usageHelp = true, description = "print this")
boolean help;

/** One line of the data; what it does not have is null. */
record Example(String text, String prompt, String completion, List<ChatMessage> messages) {}

void main(String[] args) {
    CommandLine command = new CommandLine(this).setCommandName("Sft");
    try {
        command.parseArgs(args);
        if (help) {
            command.usage(System.out);
        } else {
            run();
        }
    } catch (CommandLine.ParameterException | IllegalArgumentException | ModelFormatException e) {
        System.err.println("Sft: " + e.getMessage());
        System.exit(2);
    }
}

void run() {
    if (batchSize < 1 || epochs < 1 || steps != null && steps < 1) {
        throw new IllegalArgumentException("--batch-size, --epochs and --steps must be at least 1");
    }
    List<Example> examples = read();
    int total = steps != null ? steps : Math.ceilDiv(epochs * examples.size(), batchSize);
    TrainerOptions training = TrainerOptions.defaults().lr(learningRate(total));
    EngineOptions options = EngineOptions.defaults().dtype(dtype(dtype)).training(training);
    try (HybridEngine engine = HybridEngine.open(model, options)) {
        List<TrainingSequence> sequences = examples.stream().map(example -> sequence(engine, example)).toList();
        Iterator<TrainingSequence> order = shuffledForEver(sequences, new Random(seed));
        PendingStep before = null;
        for (int step = 0; step <= total; step++) {
            // The result of a step is asked for when the next one has been begun: a GPU never waits for the line to be printed.
            PendingStep next = step == total ? null : engine.beginTraining(Stream.generate(order::next).limit(batchSize).toList());
            if (before != null) {
                IO.println(before.await() + ", " + step * 100 / total + " %");
            }
            before = next;
        }
        if (out != null) {
            engine.save(out);
            IO.println("saved in " + out);
        }
    }
}

/** Each pass over the data has another order. */
<T> Iterator<T> shuffledForEver(List<T> items, Random random) {
    return Stream.generate(() -> {
        List<T> pass = new ArrayList<>(items);
        Collections.shuffle(pass, random);
        return pass;
    }).flatMap(List::stream).iterator();
}

TrainingSequence sequence(HybridEngine engine, Example example) {
    if (example.messages() != null) {
        return conversation(engine, example.messages());
    }
    String text = example.text() != null ? "" : example.prompt();
    int[] prompt = engine.tokenizer().encode(text, true);
    int[] completion = engine.tokenizer().encode(example.text() != null ? example.text() : example.completion(), false);
    Integer end = engine.tokenizer().eosTokenId();
    int[] last = end == null ? new int[0] : new int[] {end};
    int[] whole = Stream.of(prompt, completion, last).flatMapToInt(Arrays::stream).toArray();
    return TrainingSequence.of(whole, prompt.length, 1);
}

/**
 * The pieces of a conversation are encoded one by one: what the model will have read when it is to answer, then its
 * answer. So the tokens are those it meets when it generates.
 */
TrainingSequence conversation(HybridEngine engine, List<ChatMessage> messages) {
    ChatTemplate template = engine.tokenizer().chatTemplate();
    if (template == null) {
        throw new IllegalArgumentException(data + " holds conversations, but the model has no chat template");
    }
    List<Integer> tokens = new ArrayList<>();
    List<Boolean> trained = new ArrayList<>();
    String done = "";
    for (int turn = 0; turn < messages.size(); turn++) {
        if (messages.get(turn).role().equals("assistant")) {
            String before = template.render(messages.subList(0, turn), true);
            String after = template.render(messages.subList(0, turn + 1), false);
            if (!before.startsWith(done) || !after.startsWith(before)) {
                throw new IllegalArgumentException("the model's chat template rewrites earlier turns, so turn " + turn
                        + " cannot be trained with them: give each answer a conversation of its own");
            }
            append(engine, before.substring(done.length()), false, tokens, trained);
            append(engine, after.substring(before.length()), true, tokens, trained);
            done = after;
        }
    }
    boolean[] flags = new boolean[tokens.size()];
    float[] weights = new float[tokens.size()];
    for (int i = 0; i < flags.length; i++) {
        flags[i] = trained.get(i);
        weights[i] = flags[i] ? 1 : 0;
    }
    int[] ids = tokens.stream().mapToInt(Integer::intValue).toArray();
    return new TrainingSequence(ids, flags, weights, null, null, null);
}

/** An answer is trained up to the token that ends it; what templates write behind it the model never generates. */
void append(HybridEngine engine, String text, boolean answer, List<Integer> tokens, List<Boolean> trained) {
    List<Integer> piece = Arrays.stream(engine.tokenizer().encode(text, false)).boxed().toList();
    int end = piece.lastIndexOf(engine.tokenizer().eosTokenId());
    for (int i = 0; i < piece.size(); i++) {
        tokens.add(piece.get(i));
        trained.add(answer && (end < 0 || i <= end));
    }
}

List<Example> read() {
    List<Example> examples = new ArrayList<>();
    try {
        for (String line : Files.readAllLines(data)) {
            if (!line.isBlank()) {
                examples.add(new Gson().fromJson(line, Example.class));
                Example example = examples.getLast();
                if (example.text() == null && example.messages() == null
                        && (example.prompt() == null || example.completion() == null)) {
                    throw new IllegalArgumentException(data + ": example " + examples.size()
                            + " has neither \"text\" nor \"prompt\" and \"completion\" nor \"messages\"");
                }
            }
        }
    } catch (IOException | JsonParseException e) {
        throw new IllegalArgumentException(data + ": example " + (examples.size() + 1) + " cannot be read: " + e, e);
    }
    if (examples.isEmpty()) {
        throw new IllegalArgumentException(data + " has no examples");
    }
    return examples;
}

LearningRate learningRate(int total) {
    LearningRate rate = switch (schedule) {
        case "constant" -> LearningRate.constant(lr);
        case "linear" -> LearningRate.linear(lr, total);
        case "cosine" -> LearningRate.cosine(lr, total);
        default -> throw new IllegalArgumentException(
                "--schedule is constant, linear or cosine, found \"" + schedule + "\"");
    };
    return rate.warmup(warmup);
}

DType dtype(String name) {
    return switch (name) {
        case "float32" -> DType.FLOAT32;
        case "bfloat16" -> DType.BFLOAT16;
        default -> throw new IllegalArgumentException("--dtype is float32 or bfloat16, found \"" + name + "\"");
    };
}
