package org.apache.beam.runners.fnexecution.control;

import java.util.List;
import org.apache.beam.model.fnexecution.v1.BeamFnApi.BundleApplication;
import org.apache.beam.model.fnexecution.v1.BeamFnApi.DelayedBundleApplication;
import org.apache.beam.model.fnexecution.v1.BeamFnApi.ProcessBundleResponse;
import org.apache.beam.runners.core.StateInternalsFactory;
import org.apache.beam.runners.core.StateNamespace;
import org.apache.beam.runners.core.StateNamespaces;
import org.apache.beam.runners.core.StateTags;
import org.apache.beam.runners.core.TimerInternalsFactory;
import org.apache.beam.sdk.coders.Coder;
import org.apache.beam.sdk.coders.CoderException;
import org.apache.beam.sdk.state.TimeDomain;
import org.apache.beam.sdk.transforms.windowing.BoundedWindow;
import org.apache.beam.sdk.util.CoderUtils;
import org.apache.beam.sdk.values.WindowedValue;
import org.apache.beam.sdk.values.WindowedValues;
import org.joda.time.Instant;

/**
 * Takes the place of Beam 2.70's class of this name, which has what a splittable DoFn left to do
 * wait in Flink's state, under an id of its own each time.
 *
 * <p>In RocksDB each id is a column family, which is never dropped. After some 300 slices of each of
 * two readers, at five a second, their threads were found making one in 26 of 32 samples, and took
 * a third of a core for it. Beam 2.76 mended that (apache/beam 27648), in classes that 2.70 has
 * otherwise.
 *
 * <p>Here an id is the number of a residual among those of its bundle, so there are few. State is
 * kept by element, and what waits is read before it goes on: no other residual of the element is
 * waiting when the next one is written. This needs elements that differ from each other, as the
 * readers of these pipelines do: of two equal ones, one's residual could take the other's place.
 */
public class BundleCheckpointHandlers {

  /** Lets residuals go on by a timer, and keeps them in state until then. */
  public static class StateAndTimerBundleCheckpointHandler<T> implements BundleCheckpointHandler {

    public static final String SDF_PREFIX = "sdf_checkpoint";

    private final TimerInternalsFactory<T> timers;
    private final StateInternalsFactory<T> states;
    private final Coder<WindowedValue<T>> coder;
    private final Coder<BoundedWindow> windowCoder;

    @SuppressWarnings({"rawtypes", "unchecked"}) // the caller knows no more of windows
    public StateAndTimerBundleCheckpointHandler(
        TimerInternalsFactory<T> timers,
        StateInternalsFactory<T> states,
        Coder<WindowedValue<T>> coder,
        Coder windowCoder) {
      this.timers = timers;
      this.states = states;
      this.coder = coder;
      this.windowCoder = windowCoder;
    }

    public static boolean isSdfTimer(String timerId) {
      return timerId.startsWith(SDF_PREFIX);
    }

    @Override
    public void onCheckpoint(ProcessBundleResponse response) {
      for (int number = 0; number < response.getResidualRootsCount(); number++) {
        DelayedBundleApplication residual = response.getResidualRoots(number);
        if (!residual.hasApplication()) {
          continue;
        }
        BundleApplication application = residual.getApplication();
        WindowedValue<T> value;
        try {
          value = CoderUtils.decodeFromByteArray(coder, application.getElement().toByteArray());
        } catch (CoderException error) {
          throw new IllegalStateException("what is left of an element can't be decoded", error);
        }
        String id = SDF_PREFIX + ":" + number;
        Instant due = Instant.now();
        if (residual.hasRequestedTimeDelay()) {
          due = due.plus(residual.getRequestedTimeDelay().getSeconds() * 1000);
        }
        Instant hold = holdOf(application);
        for (BoundedWindow window : value.getWindows()) {
          StateNamespace namespace = StateNamespaces.window(windowCoder, window);
          timers
              .timerInternalsForKey(value.getValue())
              .setTimer(namespace, id, "", due, hold, TimeDomain.PROCESSING_TIME);
          states
              .stateInternalsForKey(value.getValue())
              .state(namespace, StateTags.value(id, coder))
              .write(
                  WindowedValues.of(
                      value.getValue(), value.getTimestamp(), List.of(window), value.getPaneInfo()));
        }
      }
    }

    /** The least of the residual's watermarks, which holds that of the stage until it goes on. */
    private static Instant holdOf(BundleApplication application) {
      return application.getOutputWatermarksMap().values().stream()
          .map(watermark -> Instant.ofEpochSecond(watermark.getSeconds()))
          .min(Instant::compareTo)
          .orElse(BoundedWindow.TIMESTAMP_MIN_VALUE);
    }
  }
}
