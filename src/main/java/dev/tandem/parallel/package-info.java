@NullMarked
package dev.tandem.parallel;

import org.jspecify.annotations.NullMarked;
