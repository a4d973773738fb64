package dev.tandem.model;

import dev.tandem.device.DType;
import java.lang.foreign.MemorySegment;

/**
 * A tensor of an open safetensors file.
 *
 * @param name its name in the file
 * @param dtype its element type
 * @param shape its sizes, empty for a scalar; not to be changed
 * @param data its elements in row-major, little-endian order: a read-only view of the mapped file that ends with
 *     {@link Safetensors}. The format aligns nothing, so read it with unaligned layouts
 */
@SuppressWarnings("ArrayRecordComponent")
public record TensorEntry(String name, DType dtype, long[] shape, MemorySegment data) {}
