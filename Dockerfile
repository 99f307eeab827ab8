FROM python:3.13-slim

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY bemore_voice.py demo.* schema.sql ./
COPY bemore/ bemore/

# The user may write to /data alone, where an SQLite file lies.
RUN useradd --uid 1000 bemore && install --directory --owner=bemore /data
USER 1000
WORKDIR /data

ENV HOST=0.0.0.0 PORT=8000
EXPOSE 8000
# Some hosts restart an unhealthy container, so the check must not depend on the database.
HEALTHCHECK --timeout=10s CMD ["python", "-I", "-c", "import http.client, os; server = http.client.HTTPConnection('127.0.0.1', os.environ['PORT'], timeout=9); server.request('GET', '/livez'); exit(server.getresponse().status != 200)"]
CMD ["python", "/app/bemore_voice.py"]
