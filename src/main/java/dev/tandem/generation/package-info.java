@NullMarked
package dev.tandem.generation;

import org.jspecify.annotations.NullMarked;
