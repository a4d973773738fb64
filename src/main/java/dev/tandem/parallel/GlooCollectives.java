package dev.tandem.parallel;

import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import java.time.Duration;
import java.util.function.Supplier;
import org.bytedeco.javacpp.chrono.Milliseconds;
import org.bytedeco.pytorch.FileStore;
import org.bytedeco.pytorch.GlooDeviceVector;
import org.bytedeco.pytorch.ProcessGroupGloo;
import org.bytedeco.pytorch.TensorVector;
import org.bytedeco.pytorch.Work;

/** Collectives over the loop-back interface between the threads of this process, by libtorch's Gloo. */
final class GlooCollectives implements Collectives {
    private final int rank;
    private final int size;
    private final Attendance attendance;
    private final FileStore store;
    private final ProcessGroupGloo group;

    /**
     * Meets the other ranks. All ranks must construct theirs at the same time.
     *
     * @param meetingPoint a file that does not exist yet, the same for all ranks of the group
     * @param limit how long any operation waits
     */
    GlooCollectives(int rank, int size, String meetingPoint, Duration limit, Attendance attendance) {
        this.rank = rank;
        this.size = size;
        this.attendance = attendance;
        attendance.enter(rank, "the group's meeting");
        try (Scope scope = Scope.open()) {
            store = new FileStore(meetingPoint, size);
            store.retainReference();
            var options = ProcessGroupGloo.Options.create(new Milliseconds(limit.toMillis()));
            options.devices(new GlooDeviceVector(ProcessGroupGloo.createDeviceForHostname("127.0.0.1")));
            options.threads(1);
            group = new ProcessGroupGloo(store, rank, size, options);
            group.retainReference();
        } catch (RuntimeException e) {
            throw attendance.blame(rank, e);
        }
    }

    @Override
    public int rank() {
        return rank;
    }

    @Override
    public int size() {
        return size;
    }

    @Override
    public void allReduce(Tensor tensor) {
        await("all-reduce", () -> group.allreduce(new TensorVector(tensor.nativeTensor())));
    }

    @Override
    public Tensor reduceScatter(Tensor vector) {
        Tensor slice = Tensor.empty(vector.device(), vector.dtype(), vector.elements() / size);
        await("reduce-scatter", () -> group._reduce_scatter_base(slice.nativeTensor(), vector.nativeTensor()));
        return slice;
    }

    @Override
    public void allGather(Tensor vector) {
        try (Scope scope = Scope.open()) {
            long length = vector.elements() / size;
            Tensor own = vector.narrow(0, rank * length, length).copy();
            await("all-gather", () -> group._allgather_base(vector.nativeTensor(), own.nativeTensor()));
        }
    }

    @Override
    public void barrier() {
        await("barrier", group::barrier);
    }

    private void await(String operation, Supplier<Work> start) {
        attendance.enter(rank, operation);
        try (Scope scope = Scope.open()) {
            start.get()._wait();
        } catch (RuntimeException e) {
            throw attendance.blame(rank, e);
        }
    }

    @Override
    public void close() {
        group.close();
        store.close();
    }
}
