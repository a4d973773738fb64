package dev.tandem;

import static com.tngtech.archunit.lang.syntax.ArchRuleDefinition.classes;
import static com.tngtech.archunit.lang.syntax.ArchRuleDefinition.fields;
import static com.tngtech.archunit.lang.syntax.ArchRuleDefinition.noClasses;
import static com.tngtech.archunit.library.dependencies.SlicesRuleDefinition.slices;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.tngtech.archunit.base.DescribedPredicate;
import com.tngtech.archunit.core.domain.JavaClass;
import com.tngtech.archunit.core.domain.JavaClasses;
import com.tngtech.archunit.core.domain.JavaCodeUnit;
import com.tngtech.archunit.core.domain.JavaModifier;
import com.tngtech.archunit.core.importer.ClassFileImporter;
import com.tngtech.archunit.core.importer.ImportOption;
import com.tngtech.archunit.lang.ArchCondition;
import com.tngtech.archunit.lang.ArchRule;
import com.tngtech.archunit.lang.ConditionEvents;
import com.tngtech.archunit.lang.SimpleConditionEvent;
import com.tngtech.archunit.library.GeneralCodingRules;
import java.util.Set;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;

/** Arrows between packages go one way: rl → tandem → generation, training → model → parallel, device. */
class ArchitectureTest {
    private static final String ENGINE = "dev.tandem";
    private static final String RL = "dev.tandem.rl";
    private static final String GENERATION = "dev.tandem.generation";
    private static final String TRAINING = "dev.tandem.training";
    private static final String MODEL = "dev.tandem.model";
    private static final String PARALLEL = "dev.tandem.parallel";
    private static final String DEVICE = "dev.tandem.device";
    private static final JavaClasses LIBRARY =
            new ClassFileImporter().withImportOption(new ImportOption.DoNotIncludeTests()).importPackages(ENGINE);

    @Test
    void packagesAreTheKnownOnes() {
        classes().should().resideInAnyPackage(ENGINE, RL, GENERATION, TRAINING, MODEL, PARALLEL, DEVICE).check(LIBRARY);
        for (String room : Set.of(ENGINE, RL, GENERATION, TRAINING, MODEL, PARALLEL, DEVICE)) {
            assertTrue(LIBRARY.stream().anyMatch(c -> c.getPackageName().equals(room)), room);
        }
    }

    @Test
    void arrowsGoOneWay() {
        mayOnlySee(DEVICE);
        mayOnlySee(PARALLEL, DEVICE);
        mayOnlySee(MODEL, PARALLEL, DEVICE);
        mayOnlySee(GENERATION, MODEL, PARALLEL, DEVICE);
        mayOnlySee(TRAINING, MODEL, PARALLEL, DEVICE);
        mayOnlySee(ENGINE, GENERATION, TRAINING, MODEL, PARALLEL, DEVICE);
        slices().matching("dev.tandem.(**)").should().beFreeOfCycles().check(LIBRARY);
    }

    private static void mayOnlySee(String from, String... to) {
        String[] allowed = Stream.concat(Stream.of(from), Stream.of(to)).toArray(String[]::new);
        DescribedPredicate<JavaClass> others = JavaClass.Predicates.resideInAPackage("dev.tandem..")
                .and(DescribedPredicate.not(JavaClass.Predicates.resideInAnyPackage(allowed)));
        noClasses().that().resideInAPackage(from).should().dependOnClassesThat(others).check(LIBRARY);
    }

    @Test
    void nativeTypesStayInside() {
        noClasses().that().resideInAnyPackage(ENGINE, RL, GENERATION, TRAINING, MODEL)
                .should().dependOnClassesThat().resideInAPackage("org.bytedeco..").check(LIBRARY);
        nativeSignatures().check(LIBRARY);
        // The rule sees what it is meant to see.
        assertThrows(AssertionError.class, () -> classes().that().resideInAPackage(DEVICE)
                .should(haveNoNativeTypesInPublicSignatures()).check(LIBRARY));
    }

    private static ArchRule nativeSignatures() {
        return classes().that().resideOutsideOfPackage(DEVICE).should(haveNoNativeTypesInPublicSignatures());
    }

    private static ArchCondition<JavaClass> haveNoNativeTypesInPublicSignatures() {
        return new ArchCondition<>("have no native types in public signatures") {
            @Override
            public void check(JavaClass type, ConditionEvents events) {
                if (!type.getModifiers().contains(JavaModifier.PUBLIC)) {
                    return;
                }
                for (JavaCodeUnit unit : type.getCodeUnits()) {
                    Set<JavaClass> seen = unit.getAllInvolvedRawTypes();
                    String names = seen.stream().map(JavaClass::getName).filter(n -> n.startsWith("org.bytedeco"))
                            .collect(Collectors.joining(", "));
                    boolean open = unit.getModifiers().contains(JavaModifier.PUBLIC)
                            || unit.getModifiers().contains(JavaModifier.PROTECTED);
                    if (open && !names.isEmpty()) {
                        events.add(SimpleConditionEvent.violated(unit, unit.getFullName() + " shows " + names));
                    }
                }
            }
        };
    }

    @Test
    void nothingIsPrinted() {
        GeneralCodingRules.NO_CLASSES_SHOULD_ACCESS_STANDARD_STREAMS.check(LIBRARY);
        noClasses().should().callMethod(System.class, "exit", int.class).check(LIBRARY);
    }

    @Test
    void stateIsNotShared() {
        fields().that().areStatic().and().areNotPrivate().should().beFinal().check(LIBRARY);
    }
}
