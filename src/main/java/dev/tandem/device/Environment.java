package dev.tandem.device;

import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;

/** The process's environment as native libraries see it, which Java's copy does not show. */
final class Environment {
    private Environment() {}

    /** Sets a variable for libraries that are loaded later, unless the user has set it; does nothing where there is no setenv. */
    static void setIfAbsent(String name, String value) {
        Linker linker = Linker.nativeLinker();
        var function = linker.defaultLookup().find("setenv");
        if (function.isEmpty()) {
            return;
        }
        var setenv = linker.downcallHandle(function.get(), FunctionDescriptor.of(
                ValueLayout.JAVA_INT, ValueLayout.ADDRESS, ValueLayout.ADDRESS, ValueLayout.JAVA_INT));
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment key = arena.allocateFrom(name);
            int result = (int) setenv.invokeExact(key, arena.allocateFrom(value), 0);
            if (result != 0) {
                System.getLogger(Environment.class.getName()).log(System.Logger.Level.DEBUG, "setenv {0} failed", name);
            }
        } catch (Throwable e) {
            throw new IllegalStateException("setenv " + name, e);
        }
    }
}
