# Flink with the configuration of these pipelines:
#   docker build --file runners/flink/flink.Dockerfile --tag beam_pipelines/flink:1.19.3 .
FROM flink:1.19.3-java17

COPY --chown=flink:flink runners/flink/conf/ /opt/flink/conf/

# A volume that is mounted here takes over its owner.
RUN mkdir /checkpoints /savepoints && chown flink:flink /checkpoints /savepoints
USER flink
