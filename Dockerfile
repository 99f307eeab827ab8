FROM python:3.13-slim

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY bemore_voice.py demo.html schema.sql ./
COPY bemore/ bemore/

# Nobody here may change the code. SQLite's file, where DATABASE_URL names no other database, lies in /data.
RUN useradd --uid 1000 bemore && install --directory --owner=bemore /data
USER 1000
WORKDIR /data

ENV HOST=0.0.0.0 PORT=8000
EXPOSE 8000
HEALTHCHECK --timeout=10s CMD ["python", "-I", "-c", "import http.client, os; server = http.client.HTTPConnection('127.0.0.1', os.environ['PORT'], timeout=9); server.request('GET', '/health'); exit(server.getresponse().status != 200)"]
CMD ["python", "/app/bemore_voice.py"]
