@NullMarked
package dev.tandem.rl;

import org.jspecify.annotations.NullMarked;
