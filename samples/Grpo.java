import com.google.gson.Gson;
import com.google.gson.JsonParseException;
import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.DType;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ChatMessage;
import dev.tandem.model.ModelFormatException;
import dev.tandem.rl.Algorithm;
import dev.tandem.rl.KlEstimator;
import dev.tandem.rl.PolicyTrainer;
import dev.tandem.rl.StepMetrics;
import dev.tandem.training.TrainerOptions;
import java.math.BigDecimal;
import java.util.regex.MatchResult;
import java.util.regex.Pattern;
import picocli.CommandLine;
import picocli.CommandLine.Option;

// Reinforcement learning with a verifiable reward. Each line of the data is one of
//
//     {"prompt": "…", "answer": "42"}
//     {"messages": [{"role": "user", "content": "…"}], "answer": "42"}
//
// A completion is worth 1 when its last number is the answer (where the answer is no number: when its text is), else 0.
//
//     java @target/java.args samples/Grpo.java --model DIR --data samples/data/arithmetic.jsonl --max-tokens 48

@Option(names = "--model", required = true, paramLabel = "DIR", description = "a Hugging Face folder")
Path model;

@Option(names = "--data", required = true, paramLabel = "FILE", description = "JSON lines")
Path data;

@Option(names = "--out", paramLabel = "DIR", description = "where the trained model goes (default: nowhere)")
Path out;

@Option(names = "--metrics", paramLabel = "FILE", description = "where a JSON object a step goes (default: nowhere)")
Path metrics;

@Option(names = "--algorithm", description = "grpo (default), dapo, dr-grpo, rloo or gspo")
String algorithm = "grpo";

@Option(names = "--kl", paramLabel = "K3:0.04", description = "cost of leaving the first weights: estimator, weight")
String kl;

@Option(names = "--steps", description = "optimizer steps (default: 10)")
int steps = 10;

@Option(names = "--prompts-per-step", description = "(default: 10)")
int promptsPerStep = 10;

@Option(names = "--group-size", description = "completions of each prompt (default: 8)")
int groupSize = 8;

@Option(names = "--max-tokens", description = "most tokens of a completion (default: 256)")
int maxTokens = 256;

@Option(names = "--temperature", description = "of sampling (default: 1)")
double temperature = 1;

@Option(names = "--lr", description = "learning rate (default: 1e-6)")
double lr = 1e-6;

@Option(names = "--dtype", description = "of the weights in memory: float32 (default) or bfloat16")
String dtype = "float32";

@Option(names = "--seed", description = "of samples and of the order of the data (default: 0)")
long seed;

@Option(names = "--help", usageHelp = true, description = "print this")
boolean help;

/** One line of the data; it has a prompt or messages, the other is null. */
record Problem(String prompt, List<ChatMessage> messages, String answer) {}

static final Pattern NUMBER = Pattern.compile("-?\\d+(,\\d{3})*(\\.\\d+)?");

void main(String[] args) {
    CommandLine command = new CommandLine(this).setCommandName("Grpo");
    try {
        command.parseArgs(args);
        if (help) {
            command.usage(System.out);
        } else {
            run();
        }
    } catch (CommandLine.ParameterException | IllegalArgumentException | ModelFormatException e) {
        System.err.println("Grpo: " + e.getMessage());
        System.exit(2);
    }
}

void run() {
    if (steps < 1 || promptsPerStep < 1 || temperature <= 0) {
        throw new IllegalArgumentException("--steps and --prompts-per-step must be at least 1, --temperature above 0");
    }
    SamplingParams sampling = SamplingParams.defaults().n(groupSize).maxTokens(maxTokens).temperature(temperature);
    Algorithm rule = algorithm();
    List<Problem> problems = read();
    EngineOptions options =
            EngineOptions.defaults().dtype(dtype(dtype)).seed(seed).training(TrainerOptions.defaults().lr(lr));
    try (HybridEngine engine = HybridEngine.open(model, options)) {
        Map<String, String> answers = new LinkedHashMap<>();
        problems.forEach(problem -> answers.put(
                problem.prompt() != null ? problem.prompt() : engine.chatPrompt(problem.messages()), problem.answer()));
        PolicyTrainer trainer = new PolicyTrainer(engine, rule, sampling,
                completion -> solves(completion, answers.get(completion.promptText())) ? 1 : 0);
        Iterator<String> order = shuffledForEver(List.copyOf(answers.keySet()), new Random(seed));
        for (int step = 0; step < steps; step++) {
            List<String> prompts = Stream.generate(order::next).limit(promptsPerStep).toList();
            StepMetrics result = trainer.step(prompts);
            IO.println(result);
            write(result);
        }
        if (out != null) {
            engine.save(out);
            IO.println("saved in " + out);
        }
    }
}

boolean solves(Completion completion, String answer) {
    String text = completion.text().strip();
    if (!NUMBER.matcher(answer).matches()) {
        return text.equals(answer);
    }
    return NUMBER.matcher(text).results().map(MatchResult::group).reduce((first, second) -> second)
            .filter(last -> number(last).compareTo(number(answer)) == 0).isPresent();
}

BigDecimal number(String text) {
    return new BigDecimal(text.replace(",", ""));
}

/** Each pass over the data has another order. */
<T> Iterator<T> shuffledForEver(List<T> items, Random random) {
    return Stream.generate(() -> {
        List<T> pass = new ArrayList<>(items);
        Collections.shuffle(pass, random);
        return pass;
    }).flatMap(List::stream).iterator();
}

Algorithm algorithm() {
    Algorithm rule = switch (algorithm) {
        case "grpo" -> Algorithm.grpo();
        case "dapo" -> Algorithm.dapo();
        case "dr-grpo" -> Algorithm.drGrpo(maxTokens);
        case "rloo" -> Algorithm.rloo();
        case "gspo" -> Algorithm.gspo();
        default -> throw new IllegalArgumentException(
                "--algorithm is grpo, dapo, dr-grpo, rloo or gspo, found \"" + algorithm + "\"");
    };
    if (kl == null) {
        return rule;
    }
    try {
        String[] parts = kl.split(":", 2);
        return rule.kl(KlEstimator.valueOf(parts[0]), Double.parseDouble(parts[1]));
    } catch (IllegalArgumentException | ArrayIndexOutOfBoundsException e) {
        throw new IllegalArgumentException(
                "--kl is an estimator (K1, K2 or K3), a colon and a number, such as K3:0.04, found \"" + kl + "\"");
    }
}

List<Problem> read() {
    List<Problem> problems = new ArrayList<>();
    try {
        for (String line : Files.readAllLines(data)) {
            if (!line.isBlank()) {
                Problem problem = new Gson().fromJson(line, Problem.class);
                problems.add(problem);
                if (problem.answer() == null || (problem.prompt() == null) == (problem.messages() == null)) {
                    throw new IllegalArgumentException(data + ": problem " + problems.size()
                            + " needs an \"answer\", and either a \"prompt\" or \"messages\"");
                }
            }
        }
    } catch (IOException | JsonParseException e) {
        throw new IllegalArgumentException(data + ": problem " + (problems.size() + 1) + " cannot be read: " + e, e);
    }
    if (problems.isEmpty()) {
        throw new IllegalArgumentException(data + " has no problems");
    }
    return problems;
}

void write(StepMetrics result) {
    if (metrics != null) {
        try {
            Files.writeString(metrics, result.toJson() + "\n", StandardOpenOption.CREATE,
                    result.step() == 0 ? StandardOpenOption.TRUNCATE_EXISTING : StandardOpenOption.APPEND);
        } catch (IOException e) {
            throw new IllegalArgumentException("--metrics " + metrics + " cannot be written: " + e, e);
        }
    }
}

DType dtype(String name) {
    return switch (name) {
        case "float32" -> DType.FLOAT32;
        case "bfloat16" -> DType.BFLOAT16;
        default -> throw new IllegalArgumentException("--dtype is float32 or bfloat16, found \"" + name + "\"");
    };
}
