# The pipelines, their worker pool, the job server and a Java to run it with:
#   docker build --file runners/flink/pipeline.Dockerfile --tag beam_pipelines/pipeline:0.1.0 .
FROM maven:3.9-eclipse-temurin-17 AS job-server
WORKDIR /build
COPY runners/flink/pom.xml stack/checksums.txt ./
COPY runners/flink/src src
# What it is made of is what was locked, no more and no less: as `make build-flink` does it.
RUN mvn --batch-mode --quiet org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies \
      -DincludeScope=runtime -Dmdep.prependGroupId=true -DoutputDirectory=target/dependencies && \
    sed -n 's# job-server/# target/dependencies/#p' checksums.txt > sums && \
    sha256sum --check --strict --quiet sums && \
    [ "$(ls target/dependencies | wc -l)" = "$(wc -l < sums)" ] && \
    mvn --batch-mode --quiet package

FROM eclipse-temurin:17-jre AS java

FROM python:3.11-slim
ENV JAVA_HOME=/opt/java/openjdk PATH=/opt/java/openjdk/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=java /opt/java/openjdk /opt/java/openjdk

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --require-hashes --requirement requirements.txt
COPY setup.py pyproject.toml README.md ./
COPY beam_pipelines beam_pipelines
# In place: the job server is looked for beside the package.
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
COPY --from=job-server /build/target/beam-flink-job-server.jar runners/flink/target/
COPY scripts scripts
COPY stack/worker_pool.py stack/

RUN useradd --create-home pipeline && mkdir /lake && chown pipeline /lake
USER pipeline
# What runs unless something else is asked for: the pool, for the TaskManager beside it.
CMD ["python", "-P", "stack/worker_pool.py", "127.0.0.1", "25000"]
