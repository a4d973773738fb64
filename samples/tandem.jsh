// An engine at the JShell prompt: engine.generate("…")
//
//     TANDEM_MODEL=DIR jshell --class-path "$(cat target/class-path.txt)" -R--enable-native-access=ALL-UNNAMED \
//         -R--sun-misc-unsafe-memory-access=allow samples/tandem.jsh

import dev.tandem.*
import dev.tandem.device.*
import dev.tandem.generation.*
import dev.tandem.model.*
import dev.tandem.rl.*
import dev.tandem.training.*

HybridEngine openEngine() throws IOException {
    String folder = System.getProperty("TANDEM_MODEL", System.getenv("TANDEM_MODEL"));
    if (folder != null) {
        IO.println("engine: " + folder);
        return HybridEngine.open(Path.of(folder));
    }
    Path files = Files.createTempDirectory("tandem");
    String alphabet = IntStream.rangeClosed(' ', '~').mapToObj(Character::toString).collect(Collectors.joining());
    Tokenizer.writeCharacters(files, alphabet, List.of());
    Tokenizer characters = Tokenizer.open(files);
    IO.println("engine: a tiny model with random weights, which writes nonsense."
            + " Set TANDEM_MODEL to a Hugging Face folder for another.");
    ModelConfig config = ModelConfig.qwen3(characters.vocabSize(), 64, 2, 4, 2, 256, 512);
    return HybridEngine.create(config, characters, EngineOptions.defaults());
}

HybridEngine engine = openEngine()
