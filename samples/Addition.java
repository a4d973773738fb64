import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.DType;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ChatMessage;
import dev.tandem.model.ModelFormatException;
import dev.tandem.rl.Algorithm;
import dev.tandem.rl.PolicyTrainer;
import dev.tandem.rl.StepMetrics;
import java.lang.management.ManagementFactory;
import java.util.regex.MatchResult;
import java.util.regex.Pattern;
import picocli.CommandLine;
import picocli.CommandLine.Option;

// A chat model learns to add two numbers of two digits, from nothing but whether its answers are right (GRPO with a
// verifiable reward). How many of 512 sums that it never practised it gets right is asked before and after.
//
//     java @target/java.args samples/Addition.java --model DIR --steps 120 --chart reward.svg
//
// Meant for a model as small as SmolLM2-135M-Instruct and for a GPU; on a CPU a step of that size takes minutes.

@Option(names = "--model", required = true, paramLabel = "DIR", description = "a Hugging Face folder with a chat template")
Path model;

@Option(names = "--steps", description = "optimizer steps (default: 120)")
int steps = 120;

@Option(names = "--prompts-per-step", description = "(default: 64)")
int promptsPerStep = 64;

@Option(names = "--group-size", description = "completions of each prompt (default: 8)")
int groupSize = 8;

@Option(names = "--max-tokens", description = "most tokens of a completion (default: 48)")
int maxTokens = 48;

@Option(names = "--unseen", description = "sums to ask for before and after (default: 512)")
int unseen = 512;

@Option(names = "--lr", description = "learning rate (default: 5e-6)")
double lr = 5e-6;

@Option(names = "--dtype", description = "of the weights in memory: float32 or bfloat16 (default: what suits the device)")
DType dtype;

@Option(names = "--seed", description = "of sums and samples (default: 0)")
long seed;

@Option(names = "--out", paramLabel = "DIR", description = "where the trained model goes (default: nowhere)")
Path out;

@Option(names = "--chart", paramLabel = "FILE", description = "where the reward curve goes, an SVG (default: nowhere)")
Path chart;

@Option(names = "--help", usageHelp = true, description = "print this")
boolean help;

record Sum(int a, int b) {
    static Sum random(Random random) {
        return new Sum(random.nextInt(10, 100), random.nextInt(10, 100));
    }

    String question() {
        return "What is %d plus %d?".formatted(a, b);
    }
}

static final Pattern NUMBER = Pattern.compile("\\d+");
static final Pattern QUESTION = Pattern.compile("What is (\\d+) plus (\\d+)\\?");

void main(String[] args) {
    CommandLine command = new CommandLine(this).setCommandName("Addition").setCaseInsensitiveEnumValuesAllowed(true);
    try {
        command.parseArgs(args);
        if (help) {
            command.usage(System.out);
        } else {
            run();
        }
    } catch (CommandLine.ParameterException | IllegalArgumentException | ModelFormatException e) {
        System.err.println("Addition: " + e.getMessage());
        System.exit(2);
    }
}

void run() {
    if (steps < 1 || promptsPerStep < 1 || groupSize < 2 || unseen < 1) {
        throw new IllegalArgumentException("--steps, --prompts-per-step and --unseen must be at least 1, --group-size 2");
    }
    EngineOptions options = EngineOptions.defaults().seed(seed);
    options = options.training(options.training().lr(lr).betas(0.9, 0.999));
    try (HybridEngine engine = HybridEngine.open(model, dtype == null ? options : options.dtype(dtype))) {
        IO.println("ready after %.1f s".formatted(ManagementFactory.getRuntimeMXBean().getUptime() / 1e3));
        IO.println("unseen sums right before: %.1f %%".formatted(100 * accuracy(engine)));
        PolicyTrainer trainer = new PolicyTrainer(engine, Algorithm.dapo(), SamplingParams.defaults().n(groupSize).maxTokens(maxTokens),
                completion -> right(completion) ? 1 : 0);
        Random random = new Random(seed);
        List<StepMetrics> curve = new ArrayList<>();
        long start = System.nanoTime();
        while (curve.size() < steps) {
            List<String> prompts = Stream.generate(() -> prompt(engine, Sum.random(random))).limit(promptsPerStep).toList();
            curve.add(trainer.step(prompts));
            StepMetrics last = curve.getLast();
            IO.println("step %d: reward %.3f, %.1f tokens, entropy %.3f, log-prob gap %.1e, %.1f s".formatted(curve.size(),
                    last.rewardMean(), last.responseLength(), last.entropy(), last.logprobGapMax(), (System.nanoTime() - start) / 1e9));
        }
        IO.println("%d steps in %.1f s".formatted(steps, (System.nanoTime() - start) / 1e9));
        IO.println("unseen sums right after: %.1f %%".formatted(100 * accuracy(engine)));
        draw(curve);
        if (out != null) {
            engine.save(out);
        }
    }
}

String prompt(HybridEngine engine, Sum sum) {
    return engine.chatPrompt(List.of(ChatMessage.user(sum.question())));
}

/** The last number of the answer is the sum. */
boolean right(Completion completion) {
    MatchResult asked = QUESTION.matcher(completion.promptText()).results().findFirst().orElseThrow();
    int sum = Integer.parseInt(asked.group(1)) + Integer.parseInt(asked.group(2));
    return NUMBER.matcher(completion.text().replace(",", "")).results().map(MatchResult::group)
            .reduce((first, second) -> second).filter(last -> last.equals(String.valueOf(sum))).isPresent();
}

double accuracy(HybridEngine engine) {
    List<String> prompts = IntStream.range(0, unseen)
            .mapToObj(i -> prompt(engine, Sum.random(new Random(1_000_003L * (seed + 1) + i)))).toList();
    List<Completion> said = engine.generate(prompts, SamplingParams.greedy().maxTokens(maxTokens));
    return said.stream().filter(this::right).count() / (double) unseen;
}

void draw(List<StepMetrics> curve) {
    if (chart == null) {
        return;
    }
    String points = IntStream.range(0, curve.size())
            .mapToObj(i -> (50 + 540L * i / Math.max(1, curve.size() - 1)) + "," + Math.round(310 - 260 * curve.get(i).rewardMean()))
            .collect(Collectors.joining(" "));
    try {
        Files.writeString(chart, """
                <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" font-family="sans-serif" font-size="13">
                <rect width="640" height="360" fill="white"/>
                <path d="M50 310H590M50 180H590M50 50H590" stroke="#ddd"/>
                <text x="50" y="30">mean reward</text><text x="20" y="314">0</text><text x="20" y="54">1</text>
                <text x="320" y="345" text-anchor="middle">GRPO step 1 to %d</text>
                <polyline points="%s" fill="none" stroke="#1d4ed8" stroke-width="2"/>
                </svg>
                """.formatted(curve.size(), points));
    } catch (IOException e) {
        throw new IllegalArgumentException("--chart " + chart + " cannot be written: " + e, e);
    }
}
