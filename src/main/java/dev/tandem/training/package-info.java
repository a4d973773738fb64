@NullMarked
package dev.tandem.training;

import org.jspecify.annotations.NullMarked;
