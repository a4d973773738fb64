package dev.tandem;

import dev.tandem.EngineEvents.PhaseChange;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.ProcessMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.TandemException;
import dev.tandem.device.Timeline;
import dev.tandem.device.TimelineRecorder.Span;
import dev.tandem.generation.Completion;
import dev.tandem.generation.Generator;
import dev.tandem.generation.Prompt;
import dev.tandem.generation.SamplingParams;
import dev.tandem.generation.TokenDecoder;
import dev.tandem.model.ChatMessage;
import dev.tandem.model.ChatTemplate;
import dev.tandem.model.GenerationDefaults;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.ModelFolder;
import dev.tandem.model.Tokenizer;
import dev.tandem.model.WeightArena;
import dev.tandem.parallel.Ranks;
import dev.tandem.parallel.Shares;
import dev.tandem.training.PendingStep;
import dev.tandem.training.TokenLoss;
import dev.tandem.training.TrainStep;
import dev.tandem.training.Trainer;
import dev.tandem.training.TrainingSequence;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.Map;
import java.util.SplittableRandom;
import java.util.function.Consumer;
import java.util.function.Function;
import java.util.stream.Stream;
import org.jspecify.annotations.Nullable;

/**
 * Trains and generates with one copy of the weights.
 *
 * <p>Each device has a rank: a thread, an arena that holds the weights once, a generator that reads it, and a trainer that writes it in
 * place. The engine owns all of this and moves memory between its phases: generating needs KV pages, training needs gradients and
 * activations. {@link #generate} and {@link #train} enter the phase they need; {@link #sleep} gives both sides' memory back until
 * {@link #wake}. A trained step is seen by the next generated token because both read the same bytes; {@link #weightVersion} counts
 * the steps.
 *
 * <p>One call at a time, from any thread: a call during another one (a reward function that calls the engine, a second thread) is an
 * {@link IllegalStateException}, and so is a call that the phase does not allow. Whoever opens an engine closes it.
 */
public final class HybridEngine implements AutoCloseable {
    private final ModelConfig config;
    private final @Nullable Tokenizer tokenizer;
    private final GenerationDefaults defaults;
    private final EngineOptions options;
    private final MemoryPlan plan;
    private final Ranks ranks;
    private final List<ModelRank> models;
    private final Trainer trainer;
    private final Occupancy occupancy = new Occupancy();
    private volatile Phase phase = Phase.ASLEEP;
    private volatile long weightVersion;
    /** A seed for each call that generates: a request without its own is sampled anew each time it is made. */
    private final SplittableRandom seeds;
    private final EngineTimeline timeline;
    private boolean hasReference;
    private int kvBlocks;

    private HybridEngine(ModelConfig config, @Nullable Tokenizer tokenizer, GenerationDefaults defaults, List<Integer> eosTokenIds,
            EngineOptions options, Consumer<WeightArena> fill) {
        this.config = config;
        this.tokenizer = tokenizer;
        this.defaults = defaults;
        this.options = options;
        seeds = new SplittableRandom(options.seed());
        plan = MemoryPlan.of(config, options);
        kvBlocks = plan.kvBlocks();
        ranks = new Ranks(options.devices(), options.timeLimit());
        TokenDecoder text = tokenizer == null
                ? (tokens, from, to) -> ""
                : (tokens, from, to) -> tokenizer.decode(tokens, from, to, true);
        try {
            models = ranks.onEach(rank -> new ModelRank(rank, config, options, plan, text, eosTokenIds, fill));
        } catch (RuntimeException | Error e) {
            ranks.close();
            throw e;
        }
        trainer = new Trainer(ranks, models.stream().map(ModelRank::trainer).toList(), options.training(), config.vocabSize(),
                config.maxPositions());
        timeline = new EngineTimeline(ranks, models.getFirst());
        change(Phase.GENERATION);
    }

    /** {@return an engine over a Hugging Face folder, with {@link EngineOptions#defaults}} */
    public static HybridEngine open(Path folder) {
        return open(folder, EngineOptions.defaults());
    }

    /**
     * Opens a Hugging Face folder and loads its weights. Without a tokenizer in it, prompts are token ids.
     *
     * @throws dev.tandem.model.ModelFormatException naming the file and what is wrong with it
     * @throws TandemException when the model does not fit into memory, with the plan
     */
    public static HybridEngine open(Path folder, EngineOptions options) {
        ModelFolder files = ModelFolder.open(folder);
        try {
            return new HybridEngine(files.config(), files.tokenizer(), files.generationDefaults(),
                    List.copyOf(files.eosTokenIds()), options, arena -> arena.load(files.weights()));
        } catch (RuntimeException | Error e) {
            files.close();
            throw e;
        } finally {
            files.weights().close();
        }
    }

    /**
     * Makes a model with random weights, seeded by the options.
     *
     * @param tokenizer closed with the engine; or null, and prompts are token ids
     */
    public static HybridEngine create(ModelConfig config, @Nullable Tokenizer tokenizer, EngineOptions options) {
        if (tokenizer != null && tokenizer.vocabSize() > config.vocabSize()) {
            throw new IllegalArgumentException("the tokenizer has ids up to " + (tokenizer.vocabSize() - 1)
                    + ", the model's vocabulary has " + config.vocabSize());
        }
        return new HybridEngine(config, tokenizer, GenerationDefaults.none(), config.eosTokenIds(), options,
                arena -> arena.initialize(options.seed(), Math.sqrt(2.0 / (5 * config.hiddenSize()))));
    }

    // ---- generation -----------------------------------------------------------------------------------------------------

    /** {@return the continuation of one prompt} */
    public Completion generate(String prompt) {
        return generate(prompt, defaultSampling());
    }

    /** {@return the continuation of one prompt; the first when the parameters ask for several} */
    public Completion generate(String prompt, SamplingParams params) {
        return generate(List.of(prompt), params).getFirst();
    }

    /**
     * Generates for many prompts at once, shared out over the ranks.
     *
     * @return {@code params.n()} completions of the first prompt, then of the second, …
     */
    public List<Completion> generate(List<String> prompts, SamplingParams params) {
        return generate(prompts, params, completion -> {});
    }

    /**
     * Generates for many prompts at once, shared out over the ranks.
     *
     * @param finished told of each completion as it ends, on a rank's thread, from several at a time; it must return quickly
     * @return {@code params.n()} completions of the first prompt, then of the second, …
     */
    public List<Completion> generate(List<String> prompts, SamplingParams params, Consumer<Completion> finished) {
        Tokenizer tokens = requireTokenizer();
        List<Prompt> requests = new ArrayList<>();
        try (Span span = activity("tokenizing")) {
            for (int i = 0; i < prompts.size(); i++) {
                requests.add(new Prompt(i, prompts.get(i), encode(tokens, prompts.get(i)), params));
            }
        }
        return rollout(requests, finished);
    }

    /** A text with the tokens that the model expects around it, unless it brings its first one: a rendered chat template does. */
    private static int[] encode(Tokenizer tokenizer, String prompt) {
        int[] plain = tokenizer.encode(prompt, false);
        Integer bos = tokenizer.bosTokenId();
        return bos != null && plain.length > 0 && plain[0] == bos ? plain : tokenizer.encode(prompt, true);
    }

    /** {@return as {@link #generate(List, SamplingParams)}, for prompts that are token ids} */
    public List<Completion> generateTokens(List<int[]> prompts, SamplingParams params) {
        requireOpen();
        List<Prompt> requests = new ArrayList<>();
        for (int i = 0; i < prompts.size(); i++) {
            requests.add(new Prompt(i, tokenizer == null ? "" : tokenizer.decode(prompts.get(i), false), prompts.get(i), params));
        }
        return rollout(requests, completion -> {});
    }

    /** {@return the model's answer to a conversation, through its chat template} */
    public Completion chat(List<ChatMessage> messages, SamplingParams params) {
        int[] tokens = requireTokenizer().encode(chatPrompt(messages), false);
        return generateTokens(List.of(tokens), params).getFirst();
    }

    /** {@return the text that the model's chat template makes of a conversation, up to where the answer begins} */
    public String chatPrompt(List<ChatMessage> messages) {
        ChatTemplate template = requireTokenizer().chatTemplate();
        if (template == null) {
            throw new IllegalStateException("the model has no chat template");
        }
        return template.render(messages, true, Map.of());
    }

    /**
     * Generates for prompts that each bring their own parameters, shared out over the ranks.
     *
     * @param prompts numbered 0, 1, … by {@link Prompt#index}
     * @param finished told of each completion as it ends, on a rank's thread, from several at a time; it must return quickly
     * @return completions ordered by prompt and sample
     * @throws TandemException when memory for KV pages was taken by others since the engine woke; the engine can go on
     */
    public List<Completion> rollout(List<Prompt> prompts, Consumer<Completion> finished) {
        try (Occupancy.Hold hold = occupancy.enter("generate")) {
            var event = new EngineEvents.Rollout();
            event.begin();
            enter(Phase.GENERATION);
            prompts.forEach(models.getFirst().generator()::validate);
            List<List<Prompt>> shares = share(prompts);
            long seed = seeds.nextLong();
            List<List<Completion>> parts = ranks.onEach(rank -> {
                models.get(rank.index()).generator().seed(seed);
                return generate(models.get(rank.index()), shares.get(rank.index()), finished);
            });
            List<Completion> all = new ArrayList<>();
            parts.forEach(all::addAll);
            all.sort(Comparator.comparingInt(Completion::prompt).thenComparingInt(Completion::sample));
            event.prompts = prompts.size();
            event.completions = all.size();
            event.tokens = all.stream().mapToLong(c -> c.tokens().length).sum();
            event.weightVersion = weightVersion;
            event.commit();
            return all;
        }
    }

    private List<Completion> generate(ModelRank model, List<Prompt> prompts, Consumer<Completion> finished) {
        List<Completion> done = new ArrayList<>();
        try {
            prompts.forEach(prompt -> model.generator().submit(prompt, null));
            while (model.generator().hasWork()) {
                model.generator().step(completion -> {
                    done.add(completion);
                    finished.accept(completion);
                });
            }
        } catch (RuntimeException e) {
            RuntimeException explained = model.memory().explained("generation", e);
            model.generator().reset();
            throw explained;
        } catch (Error e) {
            model.generator().reset();
            throw e;
        }
        return done;
    }

    /** Each prompt in turn to the rank with the least to do, counting prompts and what they may generate. */
    private List<List<Prompt>> share(List<Prompt> prompts) {
        Shares<Prompt> shares = new Shares<>(ranks.count());
        for (Prompt prompt : prompts) {
            shares.add(prompt, prompt.tokens().length + (long) prompt.params().n() * prompt.params().maxTokens());
        }
        return shares.lists();
    }

    /**
     * Generates one continuation token by token: each is computed when it is asked for. The engine is in use until the stream has ended
     * or is closed; closing early aborts.
     */
    public Stream<Token> stream(String prompt, SamplingParams params) {
        return stream(new Prompt(0, prompt, encode(requireTokenizer(), prompt), params));
    }

    /** {@return as {@link #stream(String, SamplingParams)}, for a prompt of token ids} */
    public Stream<Token> streamTokens(int[] prompt, SamplingParams params) {
        requireOpen();
        return stream(new Prompt(0, tokenizer == null ? "" : tokenizer.decode(prompt, false), prompt, params));
    }

    private Stream<Token> stream(Prompt request) {
        if (request.params().n() != 1) {
            throw new IllegalArgumentException("a stream has one sample, the parameters ask for " + request.params().n());
        }
        Occupancy.Hold hold = occupancy.enter("stream");
        try {
            enter(Phase.GENERATION);
            models.getFirst().generator().validate(request);
            models.getFirst().generator().seed(seeds.nextLong());
            return new TokenStream(ranks, models.getFirst().generator(), request, hold).stream();
        } catch (RuntimeException | Error e) {
            hold.close();
            throw e;
        }
    }

    /** {@return sampling as the model's authors advise in generation_config.json, up to 256 tokens} */
    public SamplingParams defaultSampling() {
        SamplingParams params = SamplingParams.defaults();
        if (Boolean.FALSE.equals(defaults.doSample())) {
            return params.temperature(0);
        }
        if (defaults.temperature() != null) {
            params = params.temperature(defaults.temperature());
        }
        if (defaults.topK() != null) {
            params = params.topK(defaults.topK());
        }
        if (defaults.topP() != null) {
            params = params.topP(defaults.topP());
        }
        if (defaults.repetitionPenalty() != null) {
            params = params.repetitionPenalty(defaults.repetitionPenalty());
        }
        return params;
    }

    // ---- training -------------------------------------------------------------------------------------------------------

    /** {@return one optimizer step, as {@link Trainer#step}; it raises {@link #weightVersion} unless it is skipped} */
    public TrainStep train(List<TrainingSequence> sequences, TokenLoss loss, double temperature) {
        try (Occupancy.Hold hold = occupancy.enter("train")) {
            return begin(sequences, loss, temperature).await();
        }
    }

    /**
     * Begins an optimizer step without waiting until a GPU has computed it. A loop that asks for the result of each step when it has begun
     * the next leaves the GPU nothing to wait for. Results that nobody has asked for are read when the engine leaves training.
     *
     * @return what the step will have done; {@link #weightVersion} is raised when that is known
     */
    public PendingStep beginTraining(List<TrainingSequence> sequences, TokenLoss loss, double temperature) {
        try (Occupancy.Hold hold = occupancy.enter("beginTraining")) {
            return begin(sequences, loss, temperature);
        }
    }

    private PendingStep begin(List<TrainingSequence> sequences, TokenLoss loss, double temperature) {
        var event = new EngineEvents.Step();
        event.begin();
        enter(Phase.TRAINING);
        return trainer.begin(sequences, loss, temperature, step -> {
            if (!step.skipped()) {
                weightVersion++;
            }
            event.step = step.step();
            event.loss = step.loss();
            event.gradientNorm = step.gradientNorm();
            event.tokens = step.tokens();
            event.skipped = step.skipped();
            event.commit();
        });
    }

    /** {@return one optimizer step of supervised training: the mean negative log-probability of the trained tokens} */
    public TrainStep train(List<TrainingSequence> sequences) {
        return train(sequences, supervised(sequences), 1);
    }

    /** {@return as {@link #beginTraining(List, TokenLoss, double)}, a step of supervised training} */
    public PendingStep beginTraining(List<TrainingSequence> sequences) {
        return beginTraining(sequences, supervised(sequences), 1);
    }

    private static TokenLoss supervised(List<TrainingSequence> sequences) {
        long tokens = sequences.stream().mapToLong(TrainingSequence::trainedTokens).sum();
        return t -> t.logprob().sum().mul(-1.0 / tokens);
    }

    /** {@return for each sequence the log-probabilities of its trained tokens by the training-side forward pass, zero elsewhere} */
    public float[][] logprobs(List<TrainingSequence> sequences, double temperature) {
        try (Occupancy.Hold hold = occupancy.enter("logprobs")) {
            enter(Phase.TRAINING);
            return trainer.logprobs(sequences, null, temperature);
        }
    }

    /** Keeps a frozen copy of the weights as they are now, as the reference of a KL penalty. It replaces an earlier one. */
    public void freezeReference() {
        try (Occupancy.Hold hold = occupancy.enter("freezeReference")) {
            requireOpen();
            onEachModel(ModelRank::freezeReference);
            hasReference = true;
        }
    }

    /** {@return as {@link #logprobs}, under the frozen reference} */
    public float[][] referenceLogprobs(List<TrainingSequence> sequences, double temperature) {
        try (Occupancy.Hold hold = occupancy.enter("referenceLogprobs")) {
            if (!hasReference) {
                throw new IllegalStateException("there is no reference: call freezeReference() first");
            }
            enter(Phase.TRAINING);
            List<WeightArena> frozen = models.stream().map(model -> java.util.Objects.requireNonNull(model.reference())).toList();
            return trainer.logprobs(sequences, frozen, temperature);
        }
    }

    // ---- phases ---------------------------------------------------------------------------------------------------------

    /** Gives KV pages, gradients and activations back until {@link #wake}. Weights and optimizer state stay. */
    public void sleep() {
        try (Occupancy.Hold hold = occupancy.enter("sleep")) {
            requireOpen();
            change(Phase.ASLEEP);
        }
    }

    /**
     * Makes room for KV pages again, at the same addresses. As many are mapped as were used before the engine slept; generation maps
     * others when it needs them.
     *
     * @throws TandemException when a rank has too little memory for all pages of the plan; the engine still sleeps then, and nothing is
     *     lost
     */
    public void wake() {
        try (Occupancy.Hold hold = occupancy.enter("wake")) {
            requireOpen();
            change(Phase.GENERATION);
        }
    }

    /**
     * Changes the size of the KV cache; samples that are under way keep their tokens. Pages that stay keep their addresses. All of the
     * cache is mapped at once, and each time the engine wakes, until a rollout has shown how much of it is used.
     *
     * @param bytes on each rank, at most what was planned when the engine was opened
     */
    public void resizeKv(long bytes) {
        try (Occupancy.Hold hold = occupancy.enter("resizeKv")) {
            requireOpen();
            long block = Generator.blockBytes(config, options.dtype(), options.generation());
            long blocks = bytes / block;
            if (blocks < 2 || blocks > plan.kvBlocks()) {
                throw new IllegalArgumentException("the KV cache can have from " + 2 * block + " to " + plan.kvBlocks() * block
                        + " bytes, asked for " + bytes);
            }
            kvBlocks = (int) blocks;
            Phase before = phase;
            if (before == Phase.GENERATION) {
                change(Phase.ASLEEP);
            }
            onEachModel(model -> model.generator().expectBlocks(kvBlocks));
            change(before);
        }
    }

    /** Enters a phase from another one in which the engine may be left without asking: not from sleep. */
    private void enter(Phase wanted) {
        requireOpen();
        if (phase == Phase.ASLEEP) {
            throw new IllegalStateException("the engine sleeps: call wake() first");
        }
        change(wanted);
    }

    private void change(Phase wanted) {
        if (phase == wanted) {
            return;
        }
        if (wanted == Phase.TRAINING) {
            plan.requireTraining();
        }
        trainer.settle();
        var event = new PhaseChange();
        event.begin();
        Phase from = phase;
        try (Span span = activity(wanted == Phase.GENERATION ? "wake" : "sleep")) {
            prepare(wanted);
        }
        phase = wanted;
        event.from = from.name();
        event.to = wanted.name();
        event.held = models.getFirst().memory().total();
        event.commit();
    }

    private void prepare(Phase wanted) {
        if (wanted == Phase.GENERATION) {
            onEachModel(model -> model.trainer().rest());
            wakeAll();
        } else {
            onEachModel(model -> model.generator().sleep());
            if (wanted == Phase.ASLEEP) {
                onEachModel(model -> model.trainer().rest());
            }
        }
    }

    /**
     * All ranks wake, or none: a failure puts those back to sleep that had succeeded. Only some pages are mapped now, but a rollout may
     * need all, and it is better told of their lack before it begins.
     */
    private void wakeAll() {
        try {
            onEachModel(model -> {
                long needed = kvBlocks * Generator.blockBytes(config, options.dtype(), options.generation());
                long parkable = plan.parked() > 0 ? model.memory().held(Use.OPTIMIZER) : 0;
                long available = DeviceMemory.available(model.memory().device()) + parkable;
                if (needed > available) {
                    throw new TandemException("waking needs " + needed + " bytes for KV pages, " + (needed - available)
                            + " more than " + model.memory().device() + " has available; held by this rank:\n" + model.memory().table());
                }
                model.generator().wake(kvBlocks);
                model.generator().weightVersion(weightVersion);
            });
        } catch (RuntimeException | Error e) {
            onEachModel(model -> {
                if (model.generator().awake()) {
                    model.generator().sleep();
                }
            });
            throw e;
        }
    }

    private void onEachModel(Consumer<ModelRank> action) {
        ranks.onEach(rank -> {
            action.accept(models.get(rank.index()));
            return true;
        });
    }

    // ---- timeline -------------------------------------------------------------------------------------------------------

    /** Begins to record what the first rank's device and the host do; what was recorded before and not asked for is forgotten. */
    public void recordTimeline() {
        try (Occupancy.Hold hold = occupancy.enter("recordTimeline")) {
            requireOpen();
            timeline.begin();
        }
    }

    /**
     * Ends the recording. Every time beyond 5 ms in which the device had nothing to do also becomes an event of Java's flight recorder.
     *
     * @throws IllegalStateException when nothing is recorded
     */
    public Timeline timeline() {
        try (Occupancy.Hold hold = occupancy.enter("timeline")) {
            requireOpen();
            return timeline.end();
        }
    }

    /** {@return an activity of the calling thread, for the timeline, that lasts until it is closed; nothing happens if none is recorded} */
    public Span activity(String name) {
        return timeline.activity(name);
    }

    private void requireOpen() {
        if (phase == Phase.CLOSED) {
            throw new IllegalStateException("the engine is closed");
        }
    }

    private Tokenizer requireTokenizer() {
        requireOpen();
        if (tokenizer == null) {
            throw new IllegalStateException("the model has no tokenizer: prompts must be token ids");
        }
        return tokenizer;
    }

    // ---- the rest -------------------------------------------------------------------------------------------------------

    /**
     * Runs a function beside the model on every rank's thread, at the same time. Tensors that it makes are released when it returns,
     * unless it keeps them. A function that writes weights calls {@link ModelRank#weightsReplaced} afterwards.
     *
     * @return the results in the order of the ranks
     * @throws dev.tandem.parallel.RankException naming a rank that threw or did not arrive where the others waited for it
     */
    public <T extends @Nullable Object> List<T> onEachRank(Function<ModelRank, T> function) {
        try (Occupancy.Hold hold = occupancy.enter("onEachRank")) {
            requireOpen();
            return ranks.onEach(rank -> {
                try (Scope scope = Scope.open()) {
                    return function.apply(models.get(rank.index()));
                }
            });
        }
    }

    /**
     * Writes the model as a Hugging Face folder that transformers and {@link #open} read: weights, config, tokenizer. Each file is
     * complete or absent, whatever happens.
     *
     * @param folder made when it does not exist
     * @throws TandemException naming the file that cannot be written
     */
    public void save(Path folder) {
        try (Occupancy.Hold hold = occupancy.enter("save")) {
            requireOpen();
            try {
                Files.createDirectories(folder);
            } catch (IOException e) {
                throw new TandemException("the folder " + folder + " to save the model in cannot be made: " + e, e);
            }
            var event = new EngineEvents.Checkpoint();
            event.begin();
            ranks.onEach(rank -> {
                if (rank.index() == 0) {
                    models.getFirst().arena().save(folder);
                }
                return true;
            });
            if (tokenizer != null) {
                tokenizer.copyTo(folder);
            }
            defaults.write(folder);
            event.folder = folder.toString();
            event.commit();
        }
    }

    /** {@return what memory is set up for} */
    public Phase phase() {
        return phase;
    }

    /** {@return the number of optimizer steps that the weights have seen since the engine was opened} */
    public long weightVersion() {
        return weightVersion;
    }

    /** {@return the model} */
    public ModelConfig config() {
        return config;
    }

    /** {@return the options the engine was opened with} */
    public EngineOptions options() {
        return options;
    }

    /** {@return the tokenizer} */
    public Tokenizer tokenizer() {
        return requireTokenizer();
    }

    /** {@return what the phases were planned to hold} */
    public MemoryPlan plan() {
        return plan;
    }

    /** {@return a table of what each rank holds and held at most, and the process's resident memory} */
    public String memory() {
        StringBuilder text = new StringBuilder();
        models.forEach(model -> text.append(model.memory().table()).append(System.lineSeparator()));
        return text.append("%-12s %12.1f %12.1f".formatted(
                "resident", ProcessMemory.resident() / 0x1p20, ProcessMemory.peak() / 0x1p20)).toString();
    }

    /** Gives everything back. A second call does nothing. */
    @Override
    public void close() {
        if (phase == Phase.CLOSED) {
            return;
        }
        try (Occupancy.Hold hold = occupancy.enter("close")) {
            phase = Phase.CLOSED;
            try {
                try {
                    trainer.settle();
                    timeline.forget();
                } finally {
                    onEachModel(ModelRank::close);
                }
            } finally {
                ranks.close();
                if (tokenizer != null) {
                    tokenizer.close();
                }
            }
        }
    }
}
