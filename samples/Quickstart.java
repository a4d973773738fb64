import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.Threads;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Tokenizer;
import dev.tandem.rl.Algorithm;
import dev.tandem.rl.PolicyTrainer;
import dev.tandem.rl.StepMetrics;
import dev.tandem.training.LearningRate;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainerOptions;
import dev.tandem.training.TrainingSequence;
import java.util.random.RandomGenerator;
import java.util.random.RandomGeneratorFactory;
import me.tongfei.progressbar.ProgressBar;
import picocli.CommandLine;
import picocli.CommandLine.Option;

// A model learns to reason, in a minute, on a CPU, from nothing.
//
// The problem: what remains of a six-digit number divided by 7? The model may answer at once, "582047%7=4", or write
// down what remains of 5, 58, 582, … first: "582047%7:521364=4". Supervised training shows it both ways, three times in
// four without the working, and that is how it then answers: at once, and wrong. Reinforcement learning shows it
// nothing. It only rewards right answers, and the model finds out that working pays. Both kinds of training, and all
// generation, use one copy of the weights.

static final int WARM_UP_STEPS = 240;
static final int MAX_TOKENS = 12;
static final SamplingParams GREEDY = SamplingParams.greedy().maxTokens(MAX_TOKENS);

@Option(names = "--seed", description = "of weights, problems and samples (default: 0)")
long seed;

@Option(names = "--steps", description = "of reinforcement learning (default: 50)")
int practiceSteps = 50;

@Option(names = "--out", description = "where the model and the chart go (default: out/quickstart)")
Path out = Path.of("out", "quickstart");

record Problem(String number) {
    static Problem random(RandomGenerator random) {
        return new Problem("%06d".formatted(random.nextInt(1_000_000)));
    }

    static Problem of(String prompt) {
        return new Problem(prompt.substring(0, prompt.indexOf('%')));
    }

    String prompt() {
        return number + "%7";
    }

    int answer() {
        return Integer.parseInt(number) % 7;
    }

    /** What remains of the number's first digit, its first two, and so on. */
    String working() {
        return IntStream.rangeClosed(1, number.length())
                .mapToObj(end -> String.valueOf(Integer.parseInt(number.substring(0, end)) % 7))
                .collect(Collectors.joining());
    }

    boolean isSolvedBy(Completion completion) {
        return completion.finish().label().equals("eos") && completion.text().endsWith("=" + answer());
    }
}

void main(String[] args) throws IOException {
    try {
        new CommandLine(this).setCommandName("Quickstart").parseArgs(args);
    } catch (CommandLine.ParameterException e) {
        System.err.println(e.getMessage());
        e.getCommandLine().usage(System.err);
        System.exit(2);
    }
    RandomGenerator random = RandomGeneratorFactory.of("L64X128MixRandom").create(seed);
    List<Problem> heldOut = Stream.generate(() -> Problem.random(random)).distinct().limit(500).toList();
    Set<Problem> unseen = Set.copyOf(heldOut);
    Iterator<Problem> problems =
            Stream.generate(() -> Problem.random(random)).filter(problem -> !unseen.contains(problem)).iterator();

    Path model = Files.createDirectories(out.resolve("model"));
    Tokenizer.writeCharacters(model, "0123456789%:=", List.of());
    Tokenizer tokenizer = Tokenizer.open(model);
    ModelConfig config = ModelConfig.qwen3(tokenizer.vocabSize(), 64, 2, 4, 4, 256, 64)
            .withSpecialTokens(tokenizer.bosTokenId(), List.of(tokenizer.eosTokenId()), tokenizer.padTokenId());
    LearningRate rate = LearningRate.linear(2e-3, WARM_UP_STEPS + practiceSteps).warmup(10).floor(0.1);
    EngineOptions options = EngineOptions.defaults().seed(seed).training(TrainerOptions.defaults().lr(rate));

    try (HybridEngine engine = HybridEngine.create(config, tokenizer, options)) {
        long start = System.nanoTime();
        engine.onEachRank(rank -> {
            Threads.perOperation(1); // a model so small computes faster than it can be shared out over cores
            return rank;
        });
        IO.println("A random model (Qwen3, 2 layers, 64 channels) learns to divide by 7.");
        List<TrainStep> lessons = warmUp(engine, problems, random);
        double before = accuracy(engine, heldOut);
        Problem example = heldOut.getFirst();
        Completion guess = engine.generate(example.prompt(), GREEDY);

        List<StepMetrics> practice = practise(engine, problems);
        double after = accuracy(engine, heldOut);
        Completion reasoned = engine.generate(example.prompt(), GREEDY);

        engine.save(model);
        report(lessons, practice);
        IO.println("""

                Held-out problems solved: %.1f %% before GRPO, %.1f %% after (%d problems, none trained on, greedy).
                Before: %s%s    After: %s%s    Right: %d

                %s
                """.formatted(100 * before, 100 * after, heldOut.size(), example.prompt(), guess.text(),
                        example.prompt(), reasoned.text(), example.answer(), engine.memory()));
        IO.println("""
                %.0f seconds in all. Reward curve: %s. The model is a Hugging Face folder; try it:

                    mvn -q compile exec:exec -Dsample=Generate -Dargs="--model %s --prompt 123456%%7 --temperature 0"
                """.formatted((System.nanoTime() - start) / 1e9, chart(practice), model));
    }
}

/** Supervised training on demonstrations, most of which jump to the answer. */
List<TrainStep> warmUp(HybridEngine engine, Iterator<Problem> problems, RandomGenerator random) {
    List<TrainStep> steps = new ArrayList<>();
    try (ProgressBar bar = new ProgressBar("Supervised warm-up", WARM_UP_STEPS)) {
        while (steps.size() < WARM_UP_STEPS) {
            List<TrainingSequence> demonstrations = Stream.generate(problems::next).limit(128).map(problem -> {
                String working = random.nextInt(4) == 0 ? ":" + problem.working() : "";
                int[] prompt = engine.tokenizer().encode(problem.prompt(), false);
                String answer = working + "=" + problem.answer() + "<eos>";
                int[] whole = engine.tokenizer().encode(problem.prompt() + answer, false);
                return TrainingSequence.of(whole, prompt.length, 1);
            }).toList();
            steps.add(engine.train(demonstrations));
            bar.step().setExtraMessage("loss %.2f".formatted(steps.getLast().loss()));
        }
    }
    return steps;
}

/** GRPO: the model tries each problem eight times; attempts that do better than the average of the eight gain. */
List<StepMetrics> practise(HybridEngine engine, Iterator<Problem> problems) {
    SamplingParams sampling = SamplingParams.defaults().n(8).maxTokens(MAX_TOKENS);
    PolicyTrainer trainer = new PolicyTrainer(engine, Algorithm.grpo(), sampling,
            attempt -> Problem.of(attempt.promptText()).isSolvedBy(attempt) ? 1 : 0);
    List<StepMetrics> steps = new ArrayList<>();
    try (ProgressBar bar = new ProgressBar("GRPO              ", practiceSteps)) {
        while (steps.size() < practiceSteps) {
            steps.add(trainer.step(Stream.generate(problems::next).limit(32).map(Problem::prompt).toList()));
            bar.step().setExtraMessage("reward %.2f".formatted(steps.getLast().rewardMean()));
        }
    }
    return steps;
}

double accuracy(HybridEngine engine, List<Problem> problems) {
    List<Completion> answers = engine.generate(problems.stream().map(Problem::prompt).toList(), GREEDY);
    long solved = answers.stream().filter(answer -> problems.get(answer.prompt()).isSolvedBy(answer)).count();
    return (double) solved / problems.size();
}

void report(List<TrainStep> lessons, List<StepMetrics> practice) {
    IO.println("\nMean reward of each GRPO step: " + practice.stream()
            .map(step -> "▁▂▃▄▅▆▇█".substring((int) (7.99 * step.rewardMean())).substring(0, 1))
            .collect(Collectors.joining()));
    IO.println("\n%6s %8s %8s %10s %14s".formatted("step", "reward", "length", "entropy", "logprob gap"));
    for (int i = 0; i < practice.size(); i += i == 0 ? 4 : 5) {
        StepMetrics step = practice.get(i);
        IO.println("%6d %8.3f %8.1f %10.3f %14.1e".formatted(
                i + 1, step.rewardMean(), step.responseLength(), step.entropy(), step.logprobGapMax()));
    }
    IO.println("\n%-20s %8s %10s".formatted("", "seconds", "tokens/s"));
    row("warm-up", lessons.stream().mapToDouble(TrainStep::seconds), lessons.stream().mapToLong(TrainStep::tokens));
    row("GRPO: generating", practice.stream().mapToDouble(s -> s.rollout().seconds()),
            practice.stream().mapToLong(s -> s.rollout().tokens()));
    row("GRPO: training", practice.stream().mapToDouble(s -> s.train().seconds()),
            practice.stream().mapToLong(s -> s.train().tokens()));
}

void row(String phase, DoubleStream seconds, LongStream tokens) {
    double time = seconds.sum();
    IO.println("%-20s %8.1f %10.0f".formatted(phase, time, tokens.sum() / time));
}

/** Drawn by hand: Java's own means need fonts, which servers lack and whoever opens the file has. */
Path chart(List<StepMetrics> practice) throws IOException {
    String svg = """
            <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" font-family="sans-serif" font-size="13">
            <rect width="640" height="360" fill="white"/>
            <path d="M50 310H590M50 245H590M50 180H590M50 115H590M50 50H590" stroke="#ddd"/>
            <g fill="#1d4ed8"><text x="50" y="30">mean reward</text>
            <text x="20" y="314">0</text><text x="20" y="184">0.5</text><text x="20" y="54">1</text></g>
            <g fill="#c2410c"><text x="590" y="30" text-anchor="end">tokens per answer</text>
            <text x="600" y="314">0</text><text x="600" y="184">%d</text><text x="600" y="54">%d</text></g>
            <text x="320" y="345" text-anchor="middle">GRPO step 1 to %d</text>
            <polyline points="%s" fill="none" stroke="#1d4ed8" stroke-width="2"/>
            <polyline points="%s" fill="none" stroke="#c2410c" stroke-width="2"/>
            </svg>
            """.formatted(MAX_TOKENS / 2, MAX_TOKENS, practice.size(), line(practice, StepMetrics::rewardMean),
                    line(practice, step -> step.responseLength() / MAX_TOKENS));
    return Files.writeString(out.resolve("reward.svg"), svg);
}

String line(List<StepMetrics> practice, ToDoubleFunction<StepMetrics> height) {
    return IntStream.range(0, practice.size()).mapToObj(i -> {
        long x = 50 + 540L * i / (practice.size() - 1);
        return x + "," + Math.round(310 - 260 * height.applyAsDouble(practice.get(i)));
    }).collect(Collectors.joining(" "));
}
