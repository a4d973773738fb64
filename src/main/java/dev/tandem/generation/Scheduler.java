package dev.tandem.generation;

import static dev.tandem.generation.RequestTable.NONE;

import dev.tandem.generation.RequestTable.State;
import java.util.Arrays;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * Decides which tokens each step computes: continuous batching over a paged KV cache.
 *
 * <p><b>No phases.</b> A sample has {@code tokenCount + pending} tokens (known ones, and ones that running steps are about to
 * sample) and {@code computed} of them have KV. A step grants tokens so that the latter catches up with the former; where it
 * does, the last token's logits are sampled. A prompt, a chunk of a prompt, a decoded token and the recomputation after a
 * preemption are all the same thing. {@code computed} advances when the step is scheduled, not when its results arrive, so the
 * next step can be scheduled while one runs; at most {@value #MAX_IN_FLIGHT} steps are in flight.
 *
 * <p><b>Two passes.</b> First the running samples continue, those that need one token before those that prefill, so that long
 * prompts never stall decoding. Then waiting ones are admitted, oldest first; the first that does not fit ends the pass. A sample
 * is admitted only if the KV of everything it has, and of one more token, fits: its blocks are taken at once, so a prefill
 * that has begun cannot run out of blocks, and two half-loaded prompts cannot wait for each other.
 *
 * <p><b>Preemption.</b> When a running sample needs a block and none is free, the sample with the least computed tokens, the
 * cheapest to recompute, loses its blocks and waits again; its tokens stay. Only a sample that no step in flight (or being
 * scheduled) uses may be chosen: the blocks of others would not be free at once, and choosing them preempts one sample after
 * another for nothing. If there is none, the needy sample sits this step out. The one with the most computed tokens is preempted
 * last, hence something always advances. A sample that does not fit even alone ends with {@link Finish.KvCapacity}.
 *
 * <p><b>Groups.</b> Of the n samples of a prompt only the first is queued. In the step that computes the end of the prompt the
 * others are forked from it: they share its blocks and draw their first token from the same logits. Those for which blocks or
 * places are missing are queued, and find the prompt in the prefix cache.
 *
 * <p>The design follows vLLM's V1 scheduler, with the victim choice of VeXact. Sampling is keyed by position, so results do not
 * depend on any decision made here. Not thread-safe: one thread calls everything. In the steady state nothing is allocated.
 */
final class Scheduler {
    /** Steps that may be scheduled and not completed. */
    static final int MAX_IN_FLIGHT = 2;

    /** Given to {@link #complete} instead of a token: the logits were not finite. */
    static final int NON_FINITE = -1;

    private static final int[] NO_TOKENS = {};
    private static final Finish EOS = new Finish.Eos();
    private static final Finish LENGTH = new Finish.Length();
    private static final Finish CONTEXT_LENGTH = new Finish.ContextLength();
    private static final Finish KV_CAPACITY = new Finish.KvCapacity();
    private static final Finish ABORTED = new Finish.Aborted();
    private static final Finish NON_FINITE_LOGITS = new Finish.NonFinite();

    private final SchedulerOptions options;
    private final BlockPool pool;
    private final RequestTable requests = new RequestTable();
    private final WaitingQueue waiting = new WaitingQueue(requests);
    private final BlockTables tables;
    private final int[] eosIds;

    private final int[] running;
    private int runningEntries;
    private int runningCount;
    private int parkedCount;
    private int[] finished = new int[16];
    private int finishedHead;
    private int finishedCount;

    private long arrivals;
    private long scheduledStep;
    private long completedStep;
    private long preemptions;
    /** A running sample lacked blocks in the pass under way, so nothing new is admitted. */
    private boolean lackedBlocks;

    Scheduler(SchedulerOptions options, BlockPool pool) {
        this.options = options;
        this.pool = pool;
        tables = new BlockTables(requests, pool, options.prefixCaching(), options.maxRunning());
        eosIds = options.eosTokenIds().stream().mapToInt(Integer::intValue).toArray();
        running = new int[options.maxRunning()];
    }

    /** {@return the samples' state, to read} Block tables and tokens change with every call into the scheduler. */
    RequestTable requests() {
        return requests;
    }

    /**
     * Queues the n samples of a prompt.
     *
     * @param requestId the caller's number, for {@link #abort}
     * @param prompt token ids; copied
     * @param sampleKeys keys of the samples' random numbers, at least {@code params.n()}; copied
     * @return the slot of the first sample; the others follow through {@link RequestTable#nextSibling}
     * @throws IllegalArgumentException if the request can never run: the prompt is empty, has an unknown token, or leaves no
     *     room in the context; or prompt and completion exceed the KV pool
     */
    int submit(long requestId, int[] prompt, SamplingParams params, long[] sampleKeys) {
        if (sampleKeys.length < params.n()) {
            throw new IllegalArgumentException(
                    "request " + requestId + ": " + params.n() + " samples but " + sampleKeys.length + " sample keys");
        }
        int limit = validate(requestId, prompt, prompt.length, params);
        int[] stopIds = stopIds(params);
        int first = NONE;
        int last = NONE;
        for (int i = 0; i < params.n(); i++) {
            int slot = claim(requestId, prompt, prompt.length, limit, params, stopIds, sampleKeys[i]);
            requests.sampleIndex[slot] = i;
            if (first == NONE) {
                first = slot;
                requests.state[slot] = State.WAITING;
                waiting.insert(slot);
            } else {
                requests.state[slot] = State.PARKED;
                parkedCount++;
                requests.nextSibling[last] = slot;
            }
            requests.leader[slot] = first;
            last = slot;
        }
        return first;
    }

    /**
     * Queues the continuation of one sample that was stopped before its end, such as a partial rollout. What it has already
     * generated counts towards {@code maxTokens} and {@code minTokens}, and with the same sample key the result is that of a
     * sample that was never stopped.
     *
     * @param tokens prompt, then the tokens generated so far; copied
     * @param promptLength tokens of the prompt
     * @return the sample's slot
     * @throws IllegalArgumentException as {@link #submit}, and if nothing is left to generate or n is not 1
     */
    int resume(long requestId, int[] tokens, int promptLength, SamplingParams params, long sampleKey) {
        if (params.n() != 1 || promptLength > tokens.length) {
            throw new IllegalArgumentException("request " + requestId + ": a continuation has one sample and includes its prompt, found n = "
                    + params.n() + ", " + promptLength + " prompt tokens of " + tokens.length);
        }
        int limit = validate(requestId, tokens, promptLength, params);
        if (tokens.length >= limit) {
            throw new IllegalArgumentException("request " + requestId + ": " + (tokens.length - promptLength)
                    + " tokens are generated already, which is all that maxTokens " + params.maxTokens() + " and the context of "
                    + options.contextLength() + " tokens allow");
        }
        int slot = claim(requestId, tokens, promptLength, limit, params, stopIds(params), sampleKey);
        requests.sampleIndex[slot] = 0;
        requests.leader[slot] = slot;
        requests.state[slot] = State.WAITING;
        waiting.insert(slot);
        return slot;
    }

    int validate(long requestId, int[] tokens, int promptLength, SamplingParams params) {
        if (promptLength < 1) {
            throw new IllegalArgumentException("request " + requestId + ": the prompt is empty; it needs at least one token");
        }
        for (int i = 0; i < tokens.length; i++) {
            if (tokens[i] < 0 || tokens[i] >= options.vocabularySize()) {
                throw new IllegalArgumentException("request " + requestId + ": token id " + tokens[i] + " at position " + i
                        + " is outside the vocabulary of " + options.vocabularySize() + " tokens");
            }
        }
        List<Integer> stops = params.stopTokenIds();
        for (int i = 0; i < stops.size(); i++) { // an iterator would be garbage
            int id = stops.get(i);
            if (id >= options.vocabularySize()) {
                throw new IllegalArgumentException("request " + requestId + ": stop token id " + id
                        + " is outside the vocabulary of " + options.vocabularySize() + " tokens");
            }
        }
        if (promptLength >= options.contextLength()) {
            throw new IllegalArgumentException("request " + requestId + ": a prompt of " + promptLength
                    + " tokens leaves no room to generate in a context of " + options.contextLength() + " tokens");
        }
        int limit = (int) Math.min((long) promptLength + params.maxTokens(), options.contextLength());
        if (pool.blocksFor(limit) > pool.usableCount()) {
            throw new IllegalArgumentException("request " + requestId + ": " + promptLength + " prompt tokens and up to "
                    + (limit - promptLength) + " generated ones need " + pool.blocksFor(limit) + " KV blocks of "
                    + pool.blockSize() + " tokens, but the pool has " + pool.usableCount()
                    + "; lower maxTokens or give the KV pool more memory");
        }
        return limit;
    }

    /** Tokens that end the request. The array is shared unless the request has stop tokens of its own. */
    private int[] stopIds(SamplingParams params) {
        int[] common = params.ignoreEos() ? NO_TOKENS : eosIds;
        List<Integer> own = params.stopTokenIds();
        if (own.isEmpty()) {
            return common;
        }
        int[] ids = Arrays.copyOf(common, common.length + own.size());
        for (int i = 0; i < own.size(); i++) {
            ids[common.length + i] = own.get(i);
        }
        return ids;
    }

    private int claim(long requestId, int[] tokens, int promptLength, int limit, SamplingParams params, int[] stopIds, long key) {
        int slot = requests.claim(limit, pool.blocksFor(limit));
        requests.requestId[slot] = requestId;
        requests.sampleKey[slot] = key;
        requests.arrival[slot] = ++arrivals;
        requests.params[slot] = params;
        requests.stopIds[slot] = stopIds;
        System.arraycopy(tokens, 0, requests.tokens[slot], 0, tokens.length);
        requests.promptLength[slot] = promptLength;
        requests.tokenCount[slot] = tokens.length;
        requests.limit[slot] = limit;
        return slot;
    }

    /**
     * Plans the next step. See {@link StepPlan} for how it is executed. The memory of blocks up to {@link BlockPool#extent} must be
     * there before it is.
     *
     * @param plan overwritten; a plan that is in flight must not be passed
     * @return false if there is nothing to compute now: everything has finished ({@link #hasWork} is false), or everything waits
     *     for a step in flight. Then the plan is empty and must be neither executed nor completed.
     * @throws IllegalStateException if {@value #MAX_IN_FLIGHT} steps are in flight already
     */
    boolean schedule(StepPlan plan) {
        if (scheduledStep - completedStep >= MAX_IN_FLIGHT) {
            throw new IllegalStateException("steps " + (completedStep + 1) + " to " + scheduledStep
                    + " are in flight; complete the first before scheduling another");
        }
        plan.begin(scheduledStep + 1);
        lackedBlocks = false;
        int budget = continueRunning(plan, options.tokenBudget(), true);
        budget = continueRunning(plan, budget, false);
        compactRunning(); // a sample may be preempted and admitted again in one call
        admitWaiting(plan, budget);
        if (plan.rowCount == 0) {
            plan.begin(0);
            return false;
        }
        scheduledStep = plan.step;
        tables.planCopies(plan);
        return true;
    }

    private int continueRunning(StepPlan plan, int budget, boolean decoding) {
        for (int i = 0; i < runningEntries && budget > 0; i++) {
            int slot = running[i];
            if (requests.state[slot] != State.RUNNING || requests.lastStep[slot] == plan.step) {
                continue;
            }
            int target = requests.tokenCount[slot] + requests.pending[slot];
            int rest = target - requests.computed[slot];
            if (target >= requests.limit[slot] || (rest == 1) != decoding) {
                continue; // its last token is in flight, or it belongs to the other pass
            }
            int granted = Math.min(Math.min(rest, options.prefillThreshold()), budget);
            if (makeRoom(plan, slot, requests.computed[slot] + granted)) {
                grant(plan, slot, granted);
                budget -= granted;
            }
        }
        return budget;
    }

    /** Gets blocks for {@code length} tokens, from others if need be. Returns whether the slot can advance. */
    private boolean makeRoom(StepPlan plan, int slot, int length) {
        while (!tables.extend(slot, length)) {
            lackedBlocks = true;
            int victim = cheapestVictim();
            boolean others = victim != NONE && victim != slot || eligible() > 1;
            if (victim == NONE || !others && (plan.rowCount > 0 || inFlight() > 0)) {
                return false; // waits for others to advance
            }
            if (!others) {
                end(slot, KV_CAPACITY);
                lackedBlocks = false; // nobody else runs, and what it held is free
                return false;
            }
            preempt(victim);
            if (victim == slot) {
                return false;
            }
        }
        return true;
    }

    private boolean eligible(int slot) {
        return requests.state[slot] == State.RUNNING && requests.lastStep[slot] <= completedStep;
    }

    private int eligible() {
        int count = 0;
        for (int i = 0; i < runningEntries; i++) {
            count += eligible(running[i]) ? 1 : 0;
        }
        return count;
    }

    /**
     * The eligible sample with the least computed tokens (the latest, among equals) whose preemption frees a block; if all share
     * all their blocks with each other, the one with the least computed tokens.
     */
    private int cheapestVictim() {
        int best = NONE;
        boolean bestFrees = false;
        for (int i = runningEntries - 1; i >= 0; i--) {
            int slot = running[i];
            if (!eligible(slot)) {
                continue;
            }
            boolean frees = tables.exclusiveBlocks(slot) > 0;
            if (best == NONE || frees && !bestFrees
                    || frees == bestFrees && requests.computed[slot] < requests.computed[best]) {
                best = slot;
                bestFrees = frees;
            }
        }
        return best;
    }

    private void preempt(int slot) {
        tables.release(slot);
        requests.computed[slot] = 0;
        requests.pending[slot] = 0;
        requests.epoch[slot]++;
        requests.state[slot] = State.WAITING;
        runningCount--;
        preemptions++;
        waiting.insert(slot);
    }

    private void admitWaiting(StepPlan plan, int budget) {
        // The head is read anew each time, because siblings may join at the front.
        for (int slot = waiting.first(); slot != NONE && budget > 0 && canAdmit(); slot = waiting.first()) {
            int count = requests.tokenCount[slot];
            int found = tables.admit(slot, reservation(slot, count), watermark());
            if (found < 0) {
                if (runningCount > 0 || inFlight() > 0) {
                    return;
                }
                end(slot, KV_CAPACITY); // the pool has shrunk below what this sample needs
                continue;
            }
            waiting.remove(slot);
            start(slot, found);
            int granted = Math.min(Math.min(count - found, options.prefillThreshold()), budget);
            grant(plan, slot, granted);
            budget -= granted;
        }
    }

    private boolean canAdmit() {
        return !lackedBlocks && runningCount < options.maxRunning();
    }

    private int watermark() {
        return runningCount == 0 ? 0 : options.watermarkBlocks();
    }

    private int reservation(int slot, int count) {
        return options.reserveFull() ? requests.limit[slot] : count + 1;
    }

    private void start(int slot, int computed) {
        if (runningEntries == running.length) {
            compactRunning();
        }
        running[runningEntries++] = slot;
        runningCount++;
        requests.state[slot] = State.RUNNING;
        requests.computed[slot] = computed;
        requests.found[slot] = computed;
        if (requests.cachedTokens[slot] == NONE) {
            requests.cachedTokens[slot] = Math.min(computed, requests.promptLength[slot]);
        }
    }

    private void grant(StepPlan plan, int slot, int granted) {
        int start = requests.computed[slot];
        int known = Math.min(granted, requests.tokenCount[slot] - start);
        boolean last = start + granted == requests.tokenCount[slot] + requests.pending[slot];
        int row = plan.addRow(slot, start, granted, known, last);
        plan.readsNew |= granted == 1 && start > 0 && start == requests.found[slot];
        requests.computed[slot] = start + granted;
        requests.lastStep[slot] = plan.step;
        tables.enterFullBlocks(slot);
        if (last) {
            plan.addSample(row, slot, requests.epoch[slot]);
            requests.pending[slot]++;
            if (parkedCount > 0 && requests.leader[slot] == slot) {
                forkSiblings(plan, row, slot);
            }
        }
    }

    private void forkSiblings(StepPlan plan, int row, int first) {
        int prompt = requests.promptLength[first];
        for (int slot = requests.nextSibling[first]; slot != NONE; slot = requests.nextSibling[slot]) {
            if (requests.state[slot] != State.PARKED) {
                continue;
            }
            parkedCount--;
            if (!canAdmit() || !tables.fork(first, slot, prompt, reservation(slot, prompt), watermark(), plan.step)) {
                requests.state[slot] = State.WAITING;
                waiting.insert(slot);
                continue;
            }
            start(slot, prompt);
            requests.pending[slot] = 1;
            requests.lastStep[slot] = plan.step;
            plan.addSample(row, slot, requests.epoch[slot]);
        }
    }

    /**
     * Applies a step's results: appends tokens, ends samples, frees what waited for the step. {@link StepPlan#accepted} tells
     * which tokens were appended.
     *
     * @param sampledTokens one token per pair of the plan, or {@link #NON_FINITE}
     * @throws IllegalStateException if the plan is not the oldest one in flight
     */
    void complete(StepPlan plan, int[] sampledTokens) {
        if (plan.step != completedStep + 1 || plan.step > scheduledStep) {
            throw new IllegalStateException("step " + plan.step + " is completed, but " + (inFlight() == 0
                    ? "no step is in flight" : "step " + (completedStep + 1) + " comes first"));
        }
        completedStep = plan.step;
        tables.stepCompleted(completedStep);
        for (int i = 0; i < plan.sampleCount; i++) {
            int slot = plan.sampleSlot[i];
            plan.accepted[i] = plan.sampleEpoch[i] == requests.epoch[slot] && append(slot, sampledTokens[i]);
        }
        compactRunning();
    }

    private boolean append(int slot, int token) {
        requests.pending[slot]--;
        if (token < 0) {
            end(slot, NON_FINITE_LOGITS);
            return false;
        }
        requests.tokens[slot][requests.tokenCount[slot]++] = token;
        tables.enterFullBlocks(slot);
        Finish finish = finishAfter(slot, token);
        if (finish != null) {
            end(slot, finish);
        }
        return true;
    }

    private @Nullable Finish finishAfter(int slot, int token) {
        int generated = requests.tokenCount[slot] - requests.promptLength[slot];
        SamplingParams params = requests.params[slot];
        if (generated > params.minTokens() && contains(requests.stopIds[slot], token)) {
            return !params.ignoreEos() && contains(eosIds, token) ? EOS : new Finish.StopToken(token);
        }
        if (generated >= params.maxTokens()) {
            return LENGTH;
        }
        return requests.tokenCount[slot] >= requests.limit[slot] ? CONTEXT_LENGTH : null;
    }

    private static boolean contains(int[] ids, int token) {
        for (int id : ids) {
            if (id == token) {
                return true;
            }
        }
        return false;
    }

    /**
     * Ends one sample for a reason that only the caller sees, such as a stop string.
     *
     * @param epoch the slot's epoch when the caller looked
     * @return false if the sample had ended or been preempted meanwhile, and nothing was done
     */
    boolean finish(int slot, int epoch, Finish reason) {
        if (requests.epoch[slot] != epoch || requests.state[slot] == State.FREE || requests.state[slot] == State.FINISHED) {
            return false;
        }
        end(slot, reason);
        compactRunning();
        return true;
    }

    /**
     * Ends all samples of a request; their tokens so far stay readable.
     *
     * @return how many samples were ended
     */
    int abort(long requestId) {
        int count = 0;
        for (int slot = 0; slot < requests.capacity(); slot++) {
            if (requests.requestId[slot] == requestId && finish(slot, requests.epoch[slot], ABORTED)) {
                count++;
            }
        }
        return count;
    }

    private void end(int slot, Finish reason) {
        switch (requests.state[slot]) {
            case RUNNING -> {
                tables.release(slot);
                runningCount--;
            }
            case WAITING -> waiting.remove(slot);
            case PARKED -> parkedCount--;
            case FREE, FINISHED -> throw new IllegalStateException("slot " + slot + " has ended already");
        }
        requests.state[slot] = State.FINISHED;
        requests.finish[slot] = reason;
        requests.epoch[slot]++;
        requests.pending[slot] = 0;
        if (parkedCount > 0 && requests.leader[slot] == slot) {
            unpark(slot);
        }
        if (finishedCount == finished.length) {
            int[] larger = new int[2 * finishedCount];
            for (int i = 0; i < finishedCount; i++) {
                larger[i] = finished[(finishedHead + i) % finishedCount];
            }
            finished = larger;
            finishedHead = 0;
        }
        finished[(finishedHead + finishedCount++) % finished.length] = slot;
    }

    /** The first sample ended before it could share the prompt: its siblings go their own way. */
    private void unpark(int first) {
        for (int slot = requests.nextSibling[first]; slot != NONE; slot = requests.nextSibling[slot]) {
            if (requests.state[slot] == State.PARKED) {
                parkedCount--;
                requests.state[slot] = State.WAITING;
                waiting.insert(slot);
            }
        }
    }

    /**
     * {@return the slot of a finished sample that was not returned before, or {@link RequestTable#NONE}} The caller reads tokens
     * and finish from the table and then calls {@link #release}.
     */
    int pollFinished() {
        if (finishedCount == 0) {
            return NONE;
        }
        int slot = finished[finishedHead];
        finishedHead = (finishedHead + 1) % finished.length;
        finishedCount--;
        return slot;
    }

    /** Gives the slot of a finished sample back, after {@link #pollFinished} has returned it. */
    void release(int slot) {
        if (requests.state[slot] != State.FINISHED) {
            throw new IllegalStateException("slot " + slot + " is released but is " + requests.state[slot]);
        }
        requests.free(slot);
    }

    /**
     * Preempts all running samples, so that no request holds KV: for sleep, for an update of the weights. They wait at their
     * place in the queue and continue from their tokens. Results in flight are dropped, to be sampled again with the same keys;
     * blocks in flight are free once the steps have completed.
     */
    void preemptAll() {
        for (int i = 0; i < runningEntries; i++) {
            if (requests.state[running[i]] == State.RUNNING) {
                preempt(running[i]);
            }
        }
        compactRunning();
    }

    /**
     * After a step in flight has failed: gives all steps in flight up, preempts everything, and forgets all cached prefixes,
     * because nobody knows what the KV memory holds. Requests continue with the next {@link #schedule}. The device must be idle.
     */
    void abandonSteps() {
        preemptAll();
        completedStep = scheduledStep;
        tables.stepCompleted(completedStep);
        pool.reset();
    }

    /** {@return whether a sample waits or runs} */
    boolean hasWork() {
        return runningCount + waiting.size() + parkedCount > 0;
    }

    /** {@return the number of steps scheduled and not completed} */
    int inFlight() {
        return (int) (scheduledStep - completedStep);
    }

    /** {@return the number of samples that hold KV blocks} */
    int runningCount() {
        return runningCount;
    }

    /** {@return the number of samples that hold none yet} */
    int waitingCount() {
        return waiting.size() + parkedCount;
    }

    /** {@return how often a sample lost its blocks, since construction} */
    long preemptionCount() {
        return preemptions;
    }

    private void compactRunning() {
        if (runningEntries == runningCount) {
            return;
        }
        int kept = 0;
        for (int i = 0; i < runningEntries; i++) {
            if (requests.state[running[i]] == State.RUNNING) {
                running[kept++] = running[i];
            }
        }
        runningEntries = kept;
    }

    /** Checks everything that must hold between calls. Used by tests; O(slots × blocks). */
    void assertInvariants() {
        pool.assertInvariants();
        long held = tables.extraReferences();
        int nowRunning = 0;
        for (int slot = 0; slot < requests.capacity(); slot++) {
            held += requests.blockCount[slot];
            if (requests.state[slot] == State.RUNNING) {
                nowRunning++;
                check(requests.computed[slot] <= requests.blockCount[slot] * pool.blockSize(), slot, "computed beyond its blocks");
                check(requests.computed[slot] <= requests.tokenCount[slot] + requests.pending[slot], slot, "computed the future");
            } else {
                check(requests.blockCount[slot] == 0, slot, "holds blocks but does not run");
            }
        }
        check(held == pool.totalReferences(), NONE, held + " references held, counted " + pool.totalReferences());
        check(nowRunning == runningCount && runningEntries == runningCount, NONE, "running count " + runningCount);
    }

    private static void check(boolean holds, int slot, String message) {
        if (!holds) {
            throw new IllegalStateException("scheduler, slot " + slot + ": " + message);
        }
    }
}
