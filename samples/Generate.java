import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.Token;
import dev.tandem.device.DType;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ChatMessage;
import dev.tandem.model.ModelFormatException;
import picocli.CommandLine;
import picocli.CommandLine.ArgGroup;
import picocli.CommandLine.Option;

// Continues texts, answers chat messages, or continues token ids. All prompts run at the same time, in one batch.
//
//     java @target/java.args samples/Generate.java --model DIR --chat "Why is the sky blue?" --temperature 0

@Option(names = "--model", required = true, paramLabel = "DIR", description = "a Hugging Face folder")
Path model;

@ArgGroup(exclusive = true, multiplicity = "1..*")
List<Source> prompts;

@Option(names = "--dtype", description = "of the weights in memory: float32 (default) or bfloat16")
String dtype = "float32";

@Option(names = "--json", description = "print one JSON object a line and nothing else")
boolean json;

@Option(names = "--temperature", description = "divides the logits; 0 is greedy (default: the model's advice, else 1)")
Double temperature;

@Option(names = "--top-k", description = "keep the k most likely tokens; 0 keeps all")
Integer topK;

@Option(names = "--top-p", description = "keep the most likely tokens that together reach this probability")
Double topP;

@Option(names = "--min-p", description = "keep tokens at least this many times as likely as the likeliest")
Double minP;

@Option(names = "--repetition-penalty", description = "lowers the logits of tokens seen before; 1 is off")
Double repetitionPenalty;

@Option(names = "--seed", description = "makes samples reproducible")
Long seed;

@Option(names = "--n", description = "completions of each prompt")
Integer n;

@Option(names = "--max-tokens", description = "most tokens of a completion")
Integer maxTokens;

@Option(names = "--min-tokens", description = "tokens before a completion may end")
Integer minTokens;

@Option(names = "--stop", paramLabel = "TEXT", description = "ends a completion; repeatable")
List<String> stops;

@Option(names = "--stop-token-id", paramLabel = "ID", description = "ends a completion; repeatable")
List<Integer> stopTokenIds;

@Option(names = "--ignore-eos", description = "go on after the end-of-sequence token")
boolean ignoreEos;

@Option(names = "--help", usageHelp = true, description = "print this")
boolean help;

/** One prompt, given in one of three ways. */
static class Source {
    @Option(names = "--prompt", paramLabel = "TEXT", required = true, description = "a text to continue; repeatable")
    String text;

    @Option(names = "--chat", paramLabel = "TEXT", required = true, description = "a message to answer; repeatable")
    String message;

    @Option(names = "--prompt-ids", paramLabel = "1,2,3", required = true, description = "ids to continue; repeatable")
    String ids;

    int[] tokens(HybridEngine engine) {
        if (ids != null) {
            return tokenIds(ids);
        }
        return text != null
                ? engine.tokenizer().encode(text, true)
                : engine.tokenizer().encode(engine.chatPrompt(List.of(ChatMessage.user(message))), false);
    }
}

void main(String[] args) {
    CommandLine command = new CommandLine(this).setCommandName("Generate");
    try {
        command.parseArgs(args);
        if (help) {
            command.usage(System.out);
        } else {
            run();
        }
    } catch (CommandLine.ParameterException | IllegalArgumentException | ModelFormatException e) {
        System.err.println("Generate: " + e.getMessage());
        System.exit(2);
    }
}

void run() {
    EngineOptions options = EngineOptions.defaults().dtype(dtype(dtype));
    if (seed == null) {
        options = options.seed(System.nanoTime());
    }
    try (HybridEngine engine = HybridEngine.open(model, options)) {
        SamplingParams sampling = sampling(engine.defaultSampling());
        List<int[]> tokens = prompts.stream().map(prompt -> prompt.tokens(engine)).toList();
        if (json) {
            engine.generateTokens(tokens, sampling).forEach(completion -> IO.println(toJson(completion)));
        } else if (tokens.size() == 1 && sampling.n() == 1) {
            stream(engine, tokens.getFirst(), sampling);
        } else {
            engine.generateTokens(tokens, sampling).forEach(completion ->
                    IO.println("[%d.%d] %s".formatted(completion.prompt(), completion.sample(), completion)));
        }
    }
}

void stream(HybridEngine engine, int[] prompt, SamplingParams sampling) {
    try (Stream<Token> tokens = engine.streamTokens(prompt, sampling)) {
        tokens.forEach(token -> {
            IO.print(token.text());
            System.out.flush();
        });
        IO.println();
    }
}

/** What the command line says, else what the model's authors advise. */
SamplingParams sampling(SamplingParams params) {
    params = temperature == null ? params : params.temperature(temperature);
    params = topK == null ? params : params.topK(topK);
    params = topP == null ? params : params.topP(topP);
    params = minP == null ? params : params.minP(minP);
    params = repetitionPenalty == null ? params : params.repetitionPenalty(repetitionPenalty);
    params = seed == null ? params : params.seed(seed);
    params = n == null ? params : params.n(n);
    params = maxTokens == null ? params : params.maxTokens(maxTokens);
    params = minTokens == null ? params : params.minTokens(minTokens);
    params = stops == null ? params : params.stopStrings(stops);
    params = stopTokenIds == null ? params : params.stopTokenIds(stopTokenIds);
    return params.ignoreEos(ignoreEos);
}

JsonObject toJson(Completion completion) {
    JsonArray tokens = new JsonArray();
    JsonArray logprobs = new JsonArray();
    for (int i = 0; i < completion.tokens().length; i++) {
        tokens.add(completion.tokens()[i]);
        logprobs.add(completion.logprobs()[i]);
    }
    JsonObject json = new JsonObject();
    json.add("tokens", tokens);
    json.add("logprobs", logprobs);
    json.addProperty("text", completion.text());
    json.addProperty("finish", completion.finish().label());
    return json;
}

static int[] tokenIds(String list) {
    try {
        return Arrays.stream(list.split(",", -1)).map(String::strip).mapToInt(Integer::parseInt).toArray();
    } catch (NumberFormatException e) {
        throw new IllegalArgumentException(
                "--prompt-ids expects token ids with commas between them, found \"" + list + "\"");
    }
}

static DType dtype(String name) {
    return switch (name) {
        case "float32" -> DType.FLOAT32;
        case "bfloat16" -> DType.BFLOAT16;
        default -> throw new IllegalArgumentException("--dtype is float32 or bfloat16, found \"" + name + "\"");
    };
}
