// Counts checks and names those that fail, for the two files of the emulator's test.
#pragma once

#include <string>

extern int failures;
extern int checks;
void expect(bool condition, const std::string& what);

// What the emulator offers a kernel, and what it reports.
void test_emulator();
