@NullMarked
package dev.tandem.device;

import org.jspecify.annotations.NullMarked;
