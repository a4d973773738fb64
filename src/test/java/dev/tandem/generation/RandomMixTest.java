package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Safetensors;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightLayout;
import dev.tandem.testing.Fixture;
import dev.tandem.testing.NativeObjects;
import dev.tandem.testing.TinyModels;
import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.SplittableRandom;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.api.Test;

/**
 * What a request gets does not depend on what runs beside it. Random models, prompts, parameters and pool sizes, with requests that
 * come late, are aborted, and sleeps in between, against each request alone in a cache that is large enough.
 *
 * <p>Other shapes round otherwise, so where two tokens are as good as equal the mixed run may choose the other one. A difference is
 * only accepted where noise of {@value #NOISE} on the logits of a plain forward pass leads to both tokens; greedily that means that
 * the best two lie within twice that.
 */
class RandomMixTest {
    private static final int MIXES = 200;
    private static final float NOISE = 5e-5f;
    private static final long SEED = 7;

    private long preemptions;
    private int cached;
    private int chunked;
    private int forkedCopies;
    private int aborted;
    private int slept;
    private int compared;
    private int ties;
    private int plain;

    @Test
    void mixesEqualRequestsAlone() {
        mix(-1);
        long pointers = Pointer.totalCount();
        for (int seed = 0; seed < MIXES; seed++) {
            try {
                mix(seed);
            } catch (RuntimeException | AssertionError e) {
                throw new AssertionError("seed " + seed + ": " + e, e);
            }
        }
        System.out.printf("%d samples equal, %d rounding ties, %d preemptions, %d prefix hits, %d chunked prompts, %d copied forks, "
                + "%d aborted, %d sleeps, %d tokens as without a cache%n", compared, ties, preemptions, cached, chunked, forkedCopies, aborted, slept, plain);
        NativeObjects.check(pointers);
        assertTrue(preemptions > 100 && cached > 100 && chunked > 100 && forkedCopies > 5 && aborted > 20 && slept > 20,
                "the mixes do not reach everything");
        assertTrue(ties * 100 < compared, ties + " rounding ties in " + compared + " samples");
    }

    private void mix(int seed) {
        SplittableRandom random = new SplittableRandom(seed);
        boolean fixture = seed % 8 == 0;
        String family = Fixture.FAMILIES.get(random.nextInt(4));
        ModelConfig config = fixture ? ModelConfig.read(Fixture.of(family).folder()) : TinyModels.random(family, random);
        try (WeightArena arena = new WeightArena(new WeightLayout(config, 1), Device.cpu(), DType.FLOAT32);
                Decoder decoder = new Decoder(config, Device.cpu(), DType.FLOAT32)) {
            if (fixture) {
                try (Safetensors checkpoint = Safetensors.open(Fixture.of(family).folder())) {
                    arena.load(checkpoint);
                }
            } else {
                arena.initialize(seed, 0.2 + random.nextDouble());
            }
            List<Prompt> prompts = prompts(config, random);
            Map<Long, Completion> alone = new HashMap<>();
            GeneratorOptions plain = GeneratorOptions.defaults().prefixCaching(false);
            try (Generator generator = generator(arena, decoder, plain, 1 + 3 * blocks(config, 16))) {
                for (Prompt prompt : prompts) {
                    for (int i = 0; i < prompt.params().n(); i++) {
                        alone.put(key(prompt.index(), i), alone(generator, prompt, i));
                    }
                }
            }
            for (Completion mixed : mixed(arena, decoder, prompts, random)) {
                Prompt prompt = prompts.get(mixed.prompt());
                compare(arena, decoder, prompt, alone.get(key(mixed.prompt(), mixed.sample())), mixed);
            }
            for (Prompt prompt : prompts.subList(0, Math.min(2, prompts.size()))) {
                checkWithoutCache(arena, decoder, prompt, alone.get(key(prompt.index(), 0)));
            }
        }
    }

    private static long key(int prompt, int sample) {
        return prompt * 100L + sample;
    }

    /** Blocks for the longest sequence. */
    private static int blocks(ModelConfig config, int blockSize) {
        return Math.ceilDiv(Math.min(config.maxPositions(), 128), blockSize);
    }

    private static Generator generator(WeightArena arena, Decoder decoder, GeneratorOptions options, int blocks) {
        DeviceMemory memory = new DeviceMemory(Device.cpu());
        Generator generator = new Generator(arena, decoder, memory, options, blocks, RandomMixTest::letters,
                arena.layout().config().eosTokenIds(), SEED);
        generator.wake(blocks);
        return generator;
    }

    private static String letters(int[] tokens, int from, int to) {
        StringBuilder text = new StringBuilder();
        for (int i = from; i < to; i++) {
            text.append((char) ('a' + tokens[i] % 26));
        }
        return text.toString();
    }

    private static List<Prompt> prompts(ModelConfig config, SplittableRandom random) {
        int longest = Math.min(config.maxPositions(), 128);
        int[] shared = random.ints(longest, 0, config.vocabSize()).toArray();
        List<Prompt> prompts = new ArrayList<>();
        int count = random.nextInt(1, 9);
        for (int i = 0; i < count; i++) {
            int length = random.nextInt(4) == 0 ? random.nextInt(1, 4) : random.nextInt(1, longest * 3 / 4);
            int[] tokens = random.ints(length, 0, config.vocabSize()).toArray();
            System.arraycopy(shared, 0, tokens, 0, random.nextBoolean() ? random.nextInt(length + 1) : 0);
            prompts.add(new Prompt(i, "", tokens, params(config, random, longest - length)));
        }
        return prompts;
    }

    private static SamplingParams params(ModelConfig config, SplittableRandom random, int room) {
        int most = random.nextInt(1, Math.min(room, 24) + 1);
        SamplingParams params = SamplingParams.greedy().maxTokens(most).minTokens(random.nextInt(3) == 0 ? random.nextInt(most + 1) : 0)
                .ignoreEos(random.nextBoolean()).n(random.nextInt(3) == 0 ? random.nextInt(2, 5) : 1)
                .logprobKind(LogprobKind.values()[random.nextInt(3)]);
        if (random.nextInt(4) == 0) {
            params = params.stopTokenIds(List.of(random.nextInt(config.vocabSize()), random.nextInt(config.vocabSize())));
        }
        if (random.nextInt(4) == 0) {
            params = params.stopStrings(List.of(String.valueOf((char) ('a' + random.nextInt(26))), "ab"));
        }
        if (random.nextInt(3) == 0) {
            params = params.repetitionPenalty(0.7 + random.nextDouble());
        }
        if (random.nextInt(3) > 0) {
            return params;
        }
        params = params.temperature(0.3 + 1.5 * random.nextDouble()).topK(random.nextInt(2) * random.nextInt(12))
                .topP(random.nextBoolean() ? 1 : 0.3 + 0.7 * random.nextDouble()).minP(random.nextBoolean() ? 0 : 0.1 * random.nextDouble());
        return random.nextBoolean() ? params : params.seed(random.nextLong());
    }

    private static Completion alone(Generator generator, Prompt prompt, int sample) {
        generator.submit(prompt, null);
        List<Completion> done = new ArrayList<>();
        while (generator.hasWork()) {
            generator.step(done::add);
        }
        return done.stream().filter(c -> c.sample() == sample).findFirst().orElseThrow();
    }

    private List<Completion> mixed(WeightArena arena, Decoder decoder, List<Prompt> prompts, SplittableRandom random) {
        int blockSize = random.nextInt(1, 33);
        int running = random.nextInt(1, 12);
        int budget = running + random.nextInt(40);
        int threshold = random.nextBoolean() ? 2048 : random.nextInt(1, 20);
        GeneratorOptions options = new GeneratorOptions(blockSize, budget, running, threshold, random.nextInt(6) == 0,
                random.nextInt(3) > 0);
        int least = 1 + prompts.stream().mapToInt(p -> Math.ceilDiv(p.tokens().length + p.params().maxTokens(), blockSize)).max().orElse(1);
        int blocks = least + (random.nextInt(3) == 0 ? 0 : random.nextInt(4 * least));
        List<Completion> done = new ArrayList<>();
        List<Prompt> later = new ArrayList<>(prompts);
        List<List<Integer>> heard = new ArrayList<>();
        prompts.forEach(p -> heard.add(new ArrayList<>()));
        Map<Long, Prompt> requests = new HashMap<>();
        try (Generator generator = generator(arena, decoder, options, blocks)) {
            long address = generator.kvAddress();
            while (!later.isEmpty() || generator.hasWork()) {
                while (!later.isEmpty() && random.nextInt(3) > 0) {
                    Prompt next = later.removeFirst();
                    List<Integer> tokens = heard.get(next.index());
                    requests.put(generator.submit(next, (id, logprob, text) -> tokens.add(id)), next);
                }
                if (random.nextInt(60) == 0 && !requests.isEmpty()) {
                    generator.abort(List.copyOf(requests.keySet()).get(random.nextInt(requests.size())));
                }
                if (random.nextInt(80) == 0) {
                    generator.sleep();
                    generator.wake(least + random.nextInt(blocks - least + 1));
                    assertEquals(address, generator.kvAddress());
                    slept++;
                }
                generator.step(done::add);
            }
            preemptions += generator.preemptions();
            long separately = done.stream().mapToLong(c -> c.promptTokens().length + c.tokens().length - 1L).sum();
            boolean partial = prompts.stream().allMatch(p -> p.params().n() == 1 || p.tokens().length % blockSize > 0);
            if (!options.prefixCaching() && generator.preemptions() == 0 && generator.computedTokens() < separately && partial
                    && done.stream().noneMatch(c -> c.finish() instanceof Finish.Aborted)) {
                forkedCopies++; // nothing but a fork saves work here, and every fork has a partial page
            }
        }
        for (Prompt prompt : prompts) {
            chunked += prompt.tokens().length > Math.min(threshold, budget) ? 1 : 0;
            Completion first = done.stream().filter(c -> c.prompt() == prompt.index() && c.sample() == 0).findFirst().orElseThrow();
            assertArrayEquals(first.tokens(), heard.get(prompt.index()).stream().mapToInt(i -> i).toArray(), "tokens of the listener");
        }
        assertEquals(prompts.stream().mapToInt(p -> p.params().n()).sum(), done.size());
        return done;
    }

    private void compare(WeightArena arena, Decoder decoder, Prompt prompt, Completion alone, Completion mixed) {
        cached += mixed.cachedTokens() > 0 ? 1 : 0;
        boolean gaveUp = mixed.finish() instanceof Finish.Aborted;
        aborted += gaveUp ? 1 : 0;
        String what = "prompt " + prompt.index() + " " + prompt.params() + ", sample " + mixed.sample();
        int common = Arrays.mismatch(alone.tokens(), mixed.tokens());
        int length = Math.min(alone.tokens().length, mixed.tokens().length);
        if (common >= 0 && common < length) {
            assertTrue(tie(arena, decoder, prompt, alone, mixed.tokens()[common], common),
                    what + ": token " + common + " differs\nalone " + alone + Arrays.toString(alone.tokens()) + "\nmixed " + mixed
                            + Arrays.toString(mixed.tokens()));
            ties++;
            length = common;
        } else if (gaveUp) {
            assertTrue(mixed.tokens().length <= alone.tokens().length, what);
        } else {
            assertEquals(alone.tokens().length, mixed.tokens().length, what);
            assertEquals(alone.text(), mixed.text(), what);
            assertEquals(alone.finish(), mixed.finish(), what);
        }
        for (int t = 0; t < length; t++) {
            assertEquals(alone.logprobs()[t], mixed.logprobs()[t], 1e-3, what + ", log-prob of token " + t);
        }
        compared++;
    }

    /** The request alone must have what the plain forward pass over its whole sequence leads to. */
    private void checkWithoutCache(WeightArena arena, Decoder decoder, Prompt prompt, Completion alone) {
        int prefix = prompt.tokens().length;
        int[] tokens = Arrays.copyOf(prompt.tokens(), prefix + alone.tokens().length);
        System.arraycopy(alone.tokens(), 0, tokens, prefix, alone.tokens().length);
        float[][] logits = PlainForward.logits(arena, decoder, tokens);
        for (int t = 0; t < alone.tokens().length; t++) {
            int[] before = Arrays.copyOf(tokens, prefix + t);
            assertTrue(leadsTo(arena, prompt, alone.sample(), before, logits[prefix + t - 1], alone.tokens()[t], alone.tokens()[t]),
                    "prompt " + prompt.index() + ", token " + t + " without a cache");
            plain++;
        }
    }

    /** Whether noise on the logits of a plain forward pass leads to both tokens. */
    private static boolean tie(WeightArena arena, Decoder decoder, Prompt prompt, Completion alone, int other, int at) {
        int prefix = prompt.tokens().length + at;
        int[] tokens = Arrays.copyOf(prompt.tokens(), prefix);
        System.arraycopy(alone.tokens(), 0, tokens, prompt.tokens().length, at);
        float[] logits = PlainForward.logits(arena, decoder, tokens)[prefix - 1];
        return leadsTo(arena, prompt, alone.sample(), tokens, logits, alone.tokens()[at], other);
    }

    private static boolean leadsTo(WeightArena arena, Prompt prompt, int sample, int[] before, float[] logits, int one, int other) {
        SamplingParams params = prompt.params();
        int[] masked = new int[0];
        if (before.length - prompt.tokens().length < params.minTokens()) {
            List<Integer> stops = new ArrayList<>(params.stopTokenIds());
            stops.addAll(params.ignoreEos() ? List.of() : arena.layout().config().eosTokenIds());
            masked = stops.stream().mapToInt(i -> i).toArray();
        }
        long seed = params.seed() == null ? SEED : params.seed();
        double uniform = CounterRandom.uniform(seed, CounterRandom.bits(prompt.index(), sample, 0), before.length);
        Sampler sampler = new Sampler(logits.length);
        SplittableRandom random = new SplittableRandom(before.length);
        boolean toOne = false;
        boolean toOther = false;
        try (Arena memory = Arena.ofConfined()) {
            MemorySegment row = memory.allocate(ValueLayout.JAVA_FLOAT, logits.length);
            for (int trial = 0; trial < 1000 && !(toOne && toOther); trial++) {
                for (int i = 0; i < logits.length; i++) {
                    row.setAtIndex(ValueLayout.JAVA_FLOAT, i, logits[i] + NOISE * (float) random.nextDouble(-1, 1));
                }
                int token = sampler.sample(row, 0, params, before, before.length, masked, uniform, Double.NaN);
                toOne |= token == one;
                toOther |= token == other;
            }
        }
        return toOne && toOther;
    }
}
