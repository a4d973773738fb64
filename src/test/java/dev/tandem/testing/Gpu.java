package dev.tandem.testing;

import dev.tandem.device.Cuda;
import dev.tandem.device.Device;
import dev.tandem.device.TandemException;
import java.lang.annotation.ElementType;
import java.lang.annotation.Retention;
import java.lang.annotation.RetentionPolicy;
import java.lang.annotation.Target;
import org.junit.jupiter.api.Tag;
import org.junit.jupiter.api.extension.ConditionEvaluationResult;
import org.junit.jupiter.api.extension.ExecutionCondition;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.api.extension.ExtensionContext;

/** Marks tests that need a CUDA device; elsewhere they are skipped, with the reason. */
@Tag("gpu")
@ExtendWith(Gpu.Condition.class)
@Target({ElementType.TYPE, ElementType.METHOD})
@Retention(RetentionPolicy.RUNTIME)
public @interface Gpu {
    /** Asks for the first device. */
    final class Condition implements ExecutionCondition {
        @Override
        public ConditionEvaluationResult evaluateExecutionCondition(ExtensionContext context) {
            try {
                Cuda.require(Device.cuda(0));
                return ConditionEvaluationResult.enabled("cuda:0 is there");
            } catch (TandemException e) {
                return ConditionEvaluationResult.disabled(String.valueOf(e.getMessage()));
            }
        }
    }
}
