#include "race.h"

#include <algorithm>
#include <memory>
#include <set>
#include <unordered_map>

namespace emulator::race {
namespace {

// What happened last to a byte. A thread's clock counts what it has passed and released; an event
// is known to a thread whose entry for the other one has reached the event's clock.
struct Cell {
  const Site* write_site = nullptr;
  const Site* read_site = nullptr;
  uint32_t write_cluster = 0, read_cluster = 0;
  uint32_t write_clock = 0, read_clock = 0;
  int32_t readers = -1;  // index of the clocks of several readers
  uint16_t writer = 0, reader = 0;
  bool written = false, read = false, read_by_several_clusters = false, by_atomic = false;
  bool initialised = false, pending = false;  // of shared memory; pending: cp.async is under way
};

// Four bytes have one cell between them, until an access takes a part of them.
struct Word {
  Cell cells[4];
  bool split = false;
};

constexpr uint64_t kPageWords = 64;
struct Page {
  Word words[kPageWords];
};

struct Detector {
  uint32_t threads_of_block = 0, threads = 0, ranks = 1;  // threads: of the cluster
  uint32_t cluster = 0;
  std::vector<uint32_t> clocks;           // [threads, threads]: what each knows of each
  std::vector<std::vector<Word>> shared;  // by rank
  std::vector<uint32_t> reader_clocks;    // [.., threads]; 0 where a thread has not read
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
  std::set<std::pair<const Site*, const Site*>> reported;

  uint32_t& clock(uint32_t of, uint32_t about) { return clocks[size_t{of} * threads + about]; }
  uint32_t* readers(int32_t index) { return &reader_clocks[size_t(index) * threads]; }
  int32_t add_readers() {
    reader_clocks.resize(reader_clocks.size() + threads, 0);
    return int32_t(reader_clocks.size() / threads) - 1;
  }
};
Detector detector;

std::string name(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line) + ": " + site.instruction;
}

void complain(const Thread& thread, const Site& site, const Site* other, const std::string& text) {
  if (detector.reported.insert({&site, other}).second) report(thread, site, kLaunchFailure, text);
}

// Who accesses, and what that thread knew of the others when it did.
struct Actor {
  uint32_t number;
  const uint32_t* knowledge;  // [threads]

  bool knows(uint32_t other, uint32_t clock) const { return knowledge[other] >= clock; }
  uint32_t now() const { return knowledge[number]; }
};
Actor actor(uint32_t number) { return {number, &detector.clock(number, 0)}; }

std::string with(const char* what, uint32_t cluster, uint32_t thread, const Site& site) {
  const uint32_t block = cluster * detector.ranks + thread / detector.threads_of_block;
  return std::string(what) + " thread " + std::to_string(thread % detector.threads_of_block) +
         " of block " + std::to_string(block) + " at " + name(site);
}

void remember_read(Cell& cell, const Actor& actor, const Site& site) {
  const uint32_t thread = actor.number, now = actor.now();
  if (cell.read && cell.read_cluster != detector.cluster) {
    cell.read_by_several_clusters = true;
    cell.read = false;
    cell.readers = -1;
  }
  if (cell.readers >= 0) {
    detector.readers(cell.readers)[thread] = now;
  } else if (cell.read && !actor.knows(cell.reader, cell.read_clock)) {
    cell.readers = detector.add_readers();
    uint32_t* clocks = detector.readers(cell.readers);
    clocks[cell.reader] = cell.read_clock;
    clocks[thread] = now;
  }
  cell.read = true;
  cell.read_cluster = detector.cluster;
  cell.reader = uint16_t(thread);
  cell.read_clock = now;
  cell.read_site = &site;
}

// The reader that this thread does not know of, or -1.
int64_t unknown_reader(const Cell& cell, const Actor& actor) {
  if (!cell.read) return -1;
  if (cell.read_cluster != detector.cluster || cell.read_by_several_clusters) return cell.reader;
  if (cell.readers < 0) return actor.knows(cell.reader, cell.read_clock) ? -1 : cell.reader;
  const uint32_t* clocks = detector.readers(cell.readers);
  for (uint32_t other = 0; other < detector.threads; ++other) {
    if (clocks[other] && !actor.knows(other, clocks[other])) return other;
  }
  return -1;
}

// `thread` is the one that finds out; `actor` may have been earlier.
void touch(Cell& cell, const Thread& thread, const Actor& actor, const Site& site, Access access) {
  const bool atomic = access == Access::atomic;
  if (cell.written && !(atomic && cell.by_atomic)) {
    const bool of_another = cell.write_cluster != detector.cluster;
    if (of_another || !actor.knows(cell.writer, cell.write_clock)) {
      complain(thread, site, cell.write_site,
               with("race: nothing orders this access after the write of", cell.write_cluster,
                    cell.writer, *cell.write_site));
    }
  }
  if (access == Access::read) {
    remember_read(cell, actor, site);
    return;
  }
  const int64_t reader = unknown_reader(cell, actor);
  if (reader >= 0) {
    complain(thread, site, cell.read_site,
             with("race: nothing orders this write after the read of", cell.read_cluster,
                  uint32_t(reader), *cell.read_site));
  }
  cell.read = cell.read_by_several_clusters = false;
  cell.readers = -1;
  cell.written = true;
  cell.by_atomic = atomic;
  cell.writer = uint16_t(actor.number);
  cell.write_cluster = detector.cluster;
  cell.write_clock = actor.now();
  cell.write_site = &site;
}

void split(Word& word) {
  if (word.split) return;
  word.split = true;
  for (int i = 1; i < 4; ++i) {
    word.cells[i] = word.cells[0];
    // Clocks of a former cluster say nothing more; the index of one's own is not to be shared.
    if (word.cells[0].readers < 0 || word.cells[0].read_cluster != detector.cluster) continue;
    word.cells[i].readers = detector.add_readers();
    std::copy_n(detector.readers(word.cells[0].readers), detector.threads,
                detector.readers(word.cells[i].readers));
  }
}

// Calls visit for each cell of the bytes, which begin at `offset` from the words' first.
template <class Visit>
void for_cells(Word* words, uint64_t offset, uint32_t bytes, const Visit& visit) {
  for (uint64_t at = offset; at < offset + bytes;) {
    Word& word = words[at / 4];
    if (at % 4 == 0 && at + 4 <= offset + bytes) {
      if (word.split) {
        for (Cell& cell : word.cells) visit(cell);
      } else {
        visit(word.cells[0]);
      }
      at += 4;
    } else {
      split(word);
      visit(word.cells[at % 4]);
      ++at;
    }
  }
}

// visit for each cell of bytes of shared memory, whoever's they are.
template <class Visit>
void for_shared_cells(const Thread& thread, const uint8_t* to, uint32_t bytes, const Visit& visit) {
  const SharedPlace place = shared_place(thread, to);
  for_cells(detector.shared[place.rank].data(), place.offset, bytes, visit);
}

// Adds what is known in `row` [threads].
void learn(std::vector<uint32_t>& knowledge, const uint32_t* row) {
  knowledge.resize(detector.threads, 0);
  for (uint32_t i = 0; i < detector.threads; ++i) knowledge[i] = std::max(knowledge[i], row[i]);
}

// A time of its own for what the thread does from now on.
void advance(uint32_t number) { ++detector.clock(number, number); }

}  // namespace

uint32_t number_of(const Thread& thread) {
  return thread.rank * detector.threads_of_block + thread.index;
}

void launch_starts(const Launch& launch) {
  detector.threads_of_block = launch.block.x * launch.block.y * launch.block.z;
  detector.ranks = launch.ranks;
  detector.threads = detector.ranks * detector.threads_of_block;
  detector.pages.clear();
  detector.reported.clear();
}

void launch_ends() { detector.pages.clear(); }

void cluster_starts(const Thread& first) {
  const uint32_t n = detector.threads;
  const Size3 grid = first.launch.grid;
  const uint32_t block = first.ctaid.x + grid.x * (first.ctaid.y + grid.y * first.ctaid.z);
  detector.cluster = block / detector.ranks;
  detector.clocks.assign(size_t{n} * n, 0);
  for (uint32_t i = 0; i < n; ++i) detector.clock(i, i) = 1;
  const std::vector<Word> untouched((first.shared_bytes + 3) / 4);
  detector.shared.assign(detector.ranks, untouched);
  detector.reader_clocks.clear();
}

void joined(const Thread& thread, std::vector<uint32_t>& participants) {
  participants.push_back(number_of(thread));
}

void passed(const std::vector<uint32_t>& participants) {
  std::vector<uint32_t> all;
  for (const uint32_t i : participants) learn(all, &detector.clock(i, 0));
  for (const uint32_t i : participants) {
    std::copy(all.begin(), all.end(), &detector.clock(i, 0));
    advance(i);
  }
}

void released(const Thread& thread, std::vector<uint32_t>& knowledge) {
  const uint32_t number = number_of(thread);
  learn(knowledge, &detector.clock(number, 0));
  advance(number);
}

bool knows(const Thread& thread, uint32_t other, const std::vector<uint32_t>& known) {
  return other == number_of(thread) || detector.clock(number_of(thread), other) >= known[other];
}

void acquired(const Thread& thread, const std::vector<uint32_t>& knowledge) {
  const uint32_t number = number_of(thread);
  for (uint32_t i = 0; i < knowledge.size(); ++i) {
    if (i == number) continue;
    detector.clock(number, i) = std::max(detector.clock(number, i), knowledge[i]);
  }
}

void shared_access(const Thread& thread, const Site& site, Access access, uint32_t rank,
                   uint32_t offset, uint32_t bytes) {
  for_cells(detector.shared[rank].data(), offset, bytes, [&](Cell& cell) {
    if (cell.pending) {
      complain(thread, site, cell.write_site,
               "access to shared memory that cp.async has not delivered yet, issued by" +
                   with("", detector.cluster, cell.writer, *cell.write_site));
    }
    if (access != Access::write && !cell.initialised) {
      complain(
          thread, site, nullptr,
          "read of shared memory that nobody has written, from byte " + std::to_string(offset));
    }
    touch(cell, thread, actor(number_of(thread)), site, access);
    cell.initialised = true;
  });
}

void global_access(const Thread& thread, const Site& site, Access access, uint64_t address,
                   uint32_t bytes) {
  // Accesses are aligned, so that none crosses a page.
  auto& page = detector.pages[address / (4 * kPageWords)];
  if (!page) page = std::make_unique<Page>();
  for_cells(page->words, address % (4 * kPageWords), bytes,
            [&](Cell& cell) { touch(cell, thread, actor(number_of(thread)), site, access); });
}

void copy_issued(const Thread& thread, const Copy& copy) {
  for_shared_cells(thread, copy.to, copy.bytes, [](Cell& cell) { cell.pending = true; });
}

// The data arrive for the thread that waits, and for others once something orders them after it.
void copy_arrived(const Thread& thread, const Site&, const Copy& copy) {
  for_shared_cells(thread, copy.to, copy.bytes, [&](Cell& cell) {
    cell.pending = false;
    touch(cell, thread, actor(number_of(thread)), *copy.site, Access::write);
  });
}

void store_arrived(const Thread& thread, const Site& site, uint32_t issuer,
                   const std::vector<uint32_t>& known, const uint8_t* to, uint32_t bytes,
                   std::vector<uint32_t>& arriving) {
  for_shared_cells(thread, to, bytes, [&](Cell& cell) {
    touch(cell, thread, Actor{issuer, known.data()}, site, Access::write);
    cell.initialised = true;
  });
  learn(arriving, known.data());
}

}  // namespace emulator::race
