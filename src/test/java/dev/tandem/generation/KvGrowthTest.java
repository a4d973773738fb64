package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.TandemException;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightLayout;
import dev.tandem.testing.NativeObjects;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.SplittableRandom;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;

/** KV pages are backed when a step needs them, and what a rollout gives does not depend on when that is. */
@ExtendWith(NativeObjects.class)
class KvGrowthTest {
    private static final ModelConfig CONFIG = ModelConfig.llama(300, 64, 2, 4, 4, 64, 256);
    private static final int BLOCKS = 400;
    private static final GeneratorOptions OPTIONS = GeneratorOptions.defaults().blockSize(4).step(64, 16, 32);

    private final DeviceMemory memory = new DeviceMemory(Device.cpu());
    private WeightArena arena;
    private Decoder decoder;
    private ScarceMemory pages;

    @BeforeEach
    void open() {
        arena = new WeightArena(new WeightLayout(CONFIG, 1), Device.cpu(), DType.FLOAT32);
        arena.initialize(3, 0.3);
        decoder = new Decoder(CONFIG, Device.cpu(), DType.FLOAT32);
    }

    @AfterEach
    void close() {
        assertEquals(0, memory.held(Use.KV));
        decoder.close();
        arena.close();
    }

    private Generator generator(GeneratorOptions options) {
        pages = new ScarceMemory(BLOCKS * blockBytes());
        return new Generator(arena, decoder, memory, options, BLOCKS, (tokens, from, to) -> "", List.of(), 7, pages);
    }

    private static long blockBytes() {
        return Generator.blockBytes(CONFIG, DType.FLOAT32, OPTIONS);
    }

    private static List<Prompt> prompts(int count, int length, long seed) {
        SplittableRandom random = new SplittableRandom(seed);
        List<Prompt> prompts = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            int[] tokens = random.ints(length, 0, 300).toArray();
            prompts.add(new Prompt(i, "", tokens, SamplingParams.defaults().n(1 + i % 3).maxTokens(20 + i).ignoreEos(true)));
        }
        return prompts;
    }

    private static void assertSame(List<Completion> expected, List<Completion> found) {
        assertEquals(expected.size(), found.size());
        for (int i = 0; i < found.size(); i++) {
            assertArrayEquals(expected.get(i).tokens(), found.get(i).tokens(), "completion " + i);
            assertArrayEquals(expected.get(i).logprobs(), found.get(i).logprobs(), "completion " + i);
            assertEquals(expected.get(i).cachedTokens(), found.get(i).cachedTokens());
        }
    }

    /** Everything mapped at once, as the reference: the same tokens, steps and preemptions. */
    private void assertAsWhenAllIsMapped(GeneratorOptions options, int room, List<Prompt> prompts) {
        List<Completion> expected;
        long steps;
        long preemptions;
        try (Generator all = generator(options)) {
            all.expectBlocks(room);
            all.wake(room);
            expected = RankGenerator.run(all, prompts);
            steps = all.times().steps();
            preemptions = all.preemptions();
            assertEquals(1, pages.commits);
        }
        try (Generator growing = generator(options)) {
            growing.wake(room);
            assertSame(expected, RankGenerator.run(growing, prompts));
            assertEquals(steps, growing.times().steps());
            assertEquals(preemptions, growing.preemptions());
            assertTrue(pages.commits > 1);
        }
    }

    @Test
    void nothingElseChanges() {
        for (boolean caching : new boolean[] {true, false}) {
            assertAsWhenAllIsMapped(OPTIONS.prefixCaching(caching), BLOCKS, prompts(30, 40, 1));
            assertAsWhenAllIsMapped(OPTIONS.prefixCaching(caching).reserveFull(true), BLOCKS, prompts(30, 40, 2));
        }
    }

    @Test
    void samplesArePreemptedOnlyWhenAllIsMapped() {
        int room = 60;
        assertAsWhenAllIsMapped(OPTIONS, room, prompts(12, 30, 3));
        try (Generator generator = generator(OPTIONS)) {
            generator.wake(room);
            prompts(12, 30, 3).forEach(prompt -> generator.submit(prompt, null));
            while (generator.preemptions() == 0) {
                generator.step(completion -> {});
            }
            assertTrue(pages.committed() >= room * blockBytes(), pages.committed() + " bytes are mapped");
            assertTrue(pages.committed() < room * blockBytes() + pages.granularity());
        }
    }

    @Test
    void memoryIsMappedWhenItIsNeededAndOnlyThen() {
        try (Generator generator = generator(OPTIONS.prefixCaching(false))) {
            generator.wake(BLOCKS);
            long unit = pages.granularity();
            assertEquals(unit, pages.committed());
            Prompt prompt = new Prompt(0, "", prompts(1, 30, 4).getFirst().tokens(), SamplingParams.defaults().ignoreEos(true).maxTokens(200));
            generator.submit(prompt, null);
            List<Completion> done = new ArrayList<>();
            for (int length = 30; generator.hasWork(); length++) {
                generator.step(done::add);
                long needed = (1 + (length + 3) / 4) * blockBytes();
                long held = memory.held(Use.KV);
                assertEquals(held, pages.committed());
                assertTrue(held >= needed && held < needed * 9 / 8 + 2 * unit, held + " bytes are mapped, " + needed + " needed");
            }
            int commits = pages.commits;
            assertTrue(commits > 2, commits + " commits");
            for (int i = 0; i < 20; i++) {
                RankGenerator.run(generator, List.of(prompt)); // its pages hold no prefix, so the next one takes them
            }
            assertEquals(commits, pages.commits);
        }
    }

    @Test
    void roomIsAskedForOnceBeforeItIsNeeded() {
        List<Long> asked = new ArrayList<>();
        try (Generator generator = generator(OPTIONS.prefixCaching(false))) {
            long free = BLOCKS * blockBytes() / 3;
            generator.askForRoom(free, () -> asked.add(pages.committed()));
            for (int rollout = 0; rollout < 3; rollout++) {
                generator.wake(BLOCKS);
                RankGenerator.run(generator, prompts(1, 30, 8));
                assertEquals(rollout, asked.size(), "few pages need no more room");
                RankGenerator.run(generator, prompts(40, 40, 9));
                assertTrue(pages.committed() > free);
                assertEquals(rollout + 1, asked.size());
                assertTrue(asked.getLast() <= free);
                generator.sleep();
                generator.expectBlocks(1);
            }
        }
    }

    @Test
    void prefixesAreKeptWhileThereIsUnmappedRoom() {
        try (Generator generator = generator(OPTIONS)) {
            generator.wake(BLOCKS);
            List<Prompt> first = prompts(1, 30, 5);
            RankGenerator.run(generator, first);
            int seed = 6;
            while (pages.committed() < BLOCKS * blockBytes()) {
                assertEquals(28, RankGenerator.run(generator, first).getFirst().cachedTokens());
                RankGenerator.run(generator, prompts(3, 30, seed++));
            }
            for (int i = 0; i < 10; i++) {
                RankGenerator.run(generator, prompts(3, 30, seed++));
            }
            assertEquals(0, RankGenerator.run(generator, first).getFirst().cachedTokens(), "all is mapped, and others came later");
            assertEquals(0, generator.preemptions());
        }
    }

    @Test
    void aWakeBeginsWithWhatTheLastRolloutUsed() {
        try (Generator generator = generator(OPTIONS)) {
            generator.wake(BLOCKS);
            long address = generator.kvAddress();
            long first = pages.committed();
            List<Prompt> large = prompts(20, 40, 7);
            List<Completion> expected = RankGenerator.run(generator, large);
            long most = pages.committed();
            for (int i = 0; i < 3; i++) {
                generator.sleep();
                assertEquals(0, pages.committed());
                assertEquals(0, memory.held(Use.KV));
                generator.wake(BLOCKS);
                long woken = pages.committed();
                assertTrue(woken > 3 * first && woken <= most, woken + " bytes are mapped, " + most + " before");
                generator.sleep();
                generator.wake(BLOCKS);
                assertEquals(woken, pages.committed(), "nothing was generated in between");
                int commits = pages.commits;
                assertSame(expected, RankGenerator.run(generator, large));
                assertEquals(commits, pages.commits, "a rollout like the last maps nothing");
                assertEquals(address, generator.kvAddress());
            }
            generator.sleep();
            generator.wake(BLOCKS);
            RankGenerator.run(generator, prompts(1, 4, 8));
            generator.sleep();
            generator.wake(BLOCKS);
            assertEquals(first, pages.committed());
            assertThrows(IllegalStateException.class, () -> generator.wake(BLOCKS));
            generator.sleep();
            generator.wake(2);
            assertEquals(pages.granularity(), pages.committed());
        }
    }

    @Test
    void aGrowthThatFailsAtAnyChunkLosesNothing() {
        List<Prompt> prompts = prompts(20, 40, 9);
        List<Prompt> small = prompts(1, 4, 10);
        List<Completion> expected;
        List<Completion> expectedSmall;
        long most;
        try (Generator generator = generator(OPTIONS)) {
            generator.wake(BLOCKS);
            expectedSmall = RankGenerator.run(generator, small);
            generator.forgetPrefixes();
            expected = RankGenerator.run(generator, prompts);
            most = pages.committed();
        }
        try (Generator generator = generator(OPTIONS)) {
            long unit = pages.granularity();
            pages.limit = 0;
            assertExplained(assertThrows(TandemException.class, () -> generator.wake(BLOCKS)));
            assertFalse(generator.awake());
            for (long limit = unit; limit < most; limit += unit) {
                pages.limit = limit;
                generator.wake(BLOCKS);
                assertExplained(assertThrows(TandemException.class, () -> RankGenerator.run(generator, prompts)));
                assertTrue(pages.committed() <= limit && memory.held(Use.KV) == pages.committed());
                generator.reset();
                assertFalse(generator.hasWork());
                assertSame(expectedSmall, RankGenerator.run(generator, small));
                generator.forgetPrefixes();

                // The samples of a failed step go on when there is memory again.
                prompts.forEach(prompt -> generator.submit(prompt, null));
                List<Completion> done = new ArrayList<>();
                int before = pages.failures;
                while (generator.hasWork()) {
                    try {
                        generator.step(done::add);
                    } catch (TandemException e) {
                        pages.limit = Long.MAX_VALUE;
                    }
                }
                assertEquals(before + 1, pages.failures);
                done.sort(Comparator.comparingInt(Completion::prompt).thenComparingInt(Completion::sample));
                for (int i = 0; i < done.size(); i++) {
                    assertArrayEquals(expected.get(i).tokens(), done.get(i).tokens());
                }
                generator.sleep();
                assertEquals(0, pages.committed());
                generator.expectBlocks(1);
            }
            assertTrue(most / unit > 10);
        }
    }

    private void assertExplained(TandemException failure) {
        assertTrue(failure.getMessage().contains("KV pages") && failure.getMessage().contains("of " + pages.limit)
                && failure.getMessage().contains("held by this rank"), failure.getMessage());
    }
}
